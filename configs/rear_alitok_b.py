"""reAR on the tokenizer AliTok, ImageNet-1k at 256 pixels (arXiv 2510.04450): FID 1.42.

    python -m rear_jax.main --config=configs/rear_alitok_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

177.0M parameters and 11.7M of projectors, which serve in training alone.
800 epochs = 500 000 steps; noise and embedding regularisation as in rear_b.py, the rest of the recipe and the guidance
are alitok_b.py's. The paper does not say which layers it regularises here: they are those of its other 24-layer models.
With --config.init_from=alitok_b.bin it starts from the published AliTok-B instead of from nothing.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 4, 56.4 GiB. v5e:16x16: 9.8 GiB.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "rear"
    config.train.loop.steps = 500_000
    config.sample.guidance_scale = 16.0
    config.sample.guidance_power = 1.8
    return config
