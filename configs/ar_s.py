"""AR-S, the plain autoregressive baseline of reAR-S, on ImageNet-1k at 256 pixels.

    python -m rear_jax.main --config=configs/ar_s.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

The same backbone, data and recipe as rear_s.py, without noise and without the embedding regularisation, so without
the two projectors. Expected: the paper has no full-length row (80 epochs without guidance: FID 21.32, IS 57.3).
Cost in the paper: not published. Not run here.
Memory as rear_s.py.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "ar"
    config.model.depth = 20
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 22.0
    config.sample.guidance_power = 2.75
    return config
