"""AR-L, the plain autoregressive baseline of reAR-L, on ImageNet-1k at 256 pixels.

    python -m rear_jax.main --config=configs/ar_l.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

The same backbone, data and recipe as rear_l.py, without noise and without the embedding regularisation, so without
the two projectors. Expected: FID 3.02, IS 256.2 (arXiv 2510.04450, table 1).
Cost in the paper: 15.99 min per epoch on 8 A800. Not run here.
Memory as rear_l.py.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "ar"
    config.model.depth = 24
    config.model.width = 1024
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 10.0
    config.sample.guidance_power = 1.75
    return config
