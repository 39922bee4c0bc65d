"""VA-π on LlamaGen-XXL at 384 pixels (arXiv 2512.19680): FID 14.36, IS 86.55 -> 7.65, 116.70 without guidance.

    python -m rear_jax.main --config=configs/va_pi_llamagen_xxl.py --workdir=DIR \
        --config.tokenizer_from=vq_ds16_c2i.pt --config.init_from=c2i_XXL_384.pt \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

100 steps of 128 images with 8 samples each, learning rate 1e-6, prior weight 0.1, no noise in the context.
With guidance (scale 1.75), after a resize to 256: 2.37, 252.16 -> 2.28, 273.53; 25 minutes on 8 A100.
Sample from the result with --job=sample --config.sample.stage=posttrain. Not run here: the results are the paper's.
8 A100 of 80 GB: remat 'products', at most 47.7 GiB. v5e:4x4: remat 'dots', 13.4 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=384)
    config.jobs = ("posttrain",)
    config.model.width = 1536
    config.model.depth = 48
    config.model.heads = 24
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 1.75
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
