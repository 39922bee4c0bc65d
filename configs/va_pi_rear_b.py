"""VA-π (arXiv 2512.19680) on reAR-B (arXiv 2510.04450) at 256 pixels: no paper has this row.

    python -m rear_jax.main --config=configs/va_pi_rear_b.py --workdir=DIR \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin --config.init_from=rear_b.safetensors \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

The recipe is that of LlamaGen in the paper: 100 steps of 128 images with 8 samples each, learning rate 1e-6, prior
weight 0.1. Before it, reAR-B is at FID 1.91 with guidance. Sample from the result with
--job=sample --config.sample.stage=posttrain. Not run here, and nothing is known to expect.
8 A100 of 80 GB: 19.5 GiB. v5e:4x4: 9.1 GiB.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.jobs = ("posttrain",)
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
