"""AliTok-XL on ImageNet-1k at 256 pixels (arXiv 2506.05289): FID 1.35, IS 318.8.

    python -m rear_jax.main --config=configs/alitok_xl.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

662.1M parameters; a plain autoregressive generator.
With --config.init_from=alitok_xl.bin --job=sample,evaluate it samples from the published weights.
400 epochs = 250 000 steps of 2048 ten-crop sequences of the published tokenizer's 273 codes, as the authors'
launcher has it; optimiser and schedule are RAR's, on whose code theirs builds, with its 62 500 steps of warm-up.
Guidance scale/power of the row: 13.0/1.4.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 8, 64.5 GiB. v5e:16x16: remat 'full', 11.8 GiB.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "ar"
    config.model.depth = 32
    config.model.width = 1280
    config.model.mlp_width = 3584
    config.train.loop.steps = 250_000
    config.sample.guidance_scale = 13.0
    config.sample.guidance_power = 1.4
    return config
