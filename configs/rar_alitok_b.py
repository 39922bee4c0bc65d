"""RAR on the tokenizer AliTok, ImageNet-1k at 256 pixels (arXiv 2510.04450): FID 1.52.

    python -m rear_jax.main --config=configs/rar_alitok_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

177.3M parameters: ar_alitok_b.py's generator and an embedding of the position that each prediction is for.
800 epochs = 500 000 steps, every sequence in random order for 400 epochs, then a share that falls to none at epoch 600;
the rest of the recipe and the guidance are alitok_b.py's.
The paper does not say how it permutes AliTok's codes, and nothing was released: here all 273 are permuted, each with
the rotary embedding of its own position (rear_jax/generators/alitok/network.py).
Not run here: the expected result is the paper's.
Memory as rear_alitok_b.py.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "rar"
    config.model.target_positions = True
    config.train.loop.steps = 500_000
    config.sample.guidance_scale = 16.0
    config.sample.guidance_power = 1.8
    return config
