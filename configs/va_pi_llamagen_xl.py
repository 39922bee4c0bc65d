"""VA-π on LlamaGen-XL at 384 pixels (arXiv 2512.19680): FID 15.55, IS 79.16 -> 9.23, 111.59 without guidance.

    python -m rear_jax.main --config=configs/va_pi_llamagen_xl.py --workdir=DIR \
        --config.tokenizer_from=vq_ds16_c2i.pt --config.init_from=c2i_XL_384.pt \
        --config.lpips.vgg16=vgg16-397923af.pth --config.lpips.heads=vgg.pth

100 steps of 128 images with 8 samples each, learning rate 1e-6, prior weight 0.1, no noise in the context.
With guidance (scale 1.75), after a resize to 256: 2.79, 286.88 -> 2.94, 299.63; 20 minutes on 8 A100.
Sample from the result with --job=sample --config.sample.stage=posttrain. Not run here: the results are the paper's.
8 A100 of 80 GB: accumulation 2, 50.0 GiB. v5e:4x4: remat 'products', at most 10.3 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=384)
    config.jobs = ("posttrain",)
    config.model.width = 1280
    config.model.depth = 36
    config.model.heads = 20
    config.model.mlp_width = 3584
    config.sample.guidance_scale = 1.75
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
