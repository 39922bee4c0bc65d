"""reAR-S on ImageNet-1k at 256 pixels (arXiv 2510.04450, table 1): FID 2.00, IS 295.7.

    python -m rear_jax.main --config=configs/rear_s.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

218.4M parameters, 231.0M with the training-only projectors (201M in the paper).
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN.
Cost in the paper: not published.
Guidance scale/power of the row: 22/2.75.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 4, 44.0 GiB. v5e:16x16: 8.6 GiB.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.model.depth = 20
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 22.0
    config.sample.guidance_power = 2.75
    return config
