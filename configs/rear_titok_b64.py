"""reAR on the tokenizer TiTok-B-64, ImageNet-1k at 256 pixels (arXiv 2510.04450): FID 4.01.

    python -m rear_jax.main --config=configs/rear_titok_b64.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=tokenizer_titok_b64.bin

265.2M parameters (the 261M of the paper are those with 1024 codes) and 11.6M of projectors.
400 epochs = 250 000 steps of 2048 ten-crop sequences of the published TiTok-B-64's 64 codes, with noise and
embedding regularisation as in rear_b.py.
The guidance is rear_b.py's: the paper names none for this tokenizer.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: 40.9 GiB. v5e:16x16: 6.5 GiB.
"""

from rear_jax.config import default, titok


def get_config():
    config = default()
    config.tokenizer = titok()
    config.method.name = "rear"
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 14.5
    config.sample.guidance_power = 2.25
    return config
