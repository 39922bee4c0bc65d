"""reAR-B on ImageNet-1k at 256 pixels (arXiv 2510.04450, table 1): FID 1.91, IS 300.9.

    python -m rear_jax.main --config=configs/rear_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

261M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN.
Cost in the paper: 8.14 minutes per epoch on 8 A800, so about 434 A800-hours.
Guidance scale/power of the row: 14.5/2.25 (released config: 15/2.5).
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 4, 52.2 GiB. v5e:16x16: 10.2 GiB.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
