"""AR on the tokenizer AliTok, ImageNet-1k at 256 pixels (arXiv 2510.04450): FID 1.50.

    python -m rear_jax.main --config=configs/ar_alitok_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

177.0M parameters: alitok_b.py, the published AliTok-B, as the baseline of rar_alitok_b.py and rear_alitok_b.py.
800 epochs = 500 000 steps; the rest of the recipe and the guidance are alitok_b.py's.
Not run here: the expected result is the paper's.
Memory as rear_alitok_b.py.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "ar"
    config.train.loop.steps = 500_000
    config.sample.guidance_scale = 16.0
    config.sample.guidance_power = 1.8
    return config
