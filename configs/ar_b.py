"""AR-B, the plain autoregressive baseline of reAR-B, on ImageNet-1k at 256 pixels.

    python -m rear_jax.main --config=configs/ar_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

The same backbone, data and recipe as rear_b.py, without noise and without the embedding regularisation, so without
the two projectors. Expected: the paper gives no FID for this size.
Cost in the paper: 8.11 min per epoch on 8 A800. Not run here.
Memory as rear_b.py.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "ar"
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
