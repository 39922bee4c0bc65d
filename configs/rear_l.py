"""reAR-L on ImageNet-1k at 256 pixels (arXiv 2510.04450, table 1): FID 1.86, IS 316.9.

    python -m rear_jax.main --config=configs/rear_l.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

461M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN.
Cost in the paper: 16.05 minutes per epoch on 8 A800, so about 856 A800-hours.
Guidance scale/power of the row: 10/1.75 (11/1.75 gives FID 1.90, IS 323.2; released config: 15/2.5).
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 4, 67.3 GiB. v5e:16x16: remat 'products', at most 11.3 GiB.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.model.depth = 24
    config.model.width = 1024
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 10.0
    config.sample.guidance_power = 1.75
    return config
