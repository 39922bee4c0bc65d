"""AliTok-L on ImageNet-1k at 256 pixels (arXiv 2506.05289): FID 1.42, IS 326.6.

    python -m rear_jax.main --config=configs/alitok_l.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

317.9M parameters; a plain autoregressive generator.
With --config.init_from=alitok_l.bin --job=sample,evaluate it samples from the published weights.
800 epochs = 500 000 steps of 2048 ten-crop sequences of the published tokenizer's 273 codes, as the authors'
launcher has it; optimiser and schedule are RAR's, on whose code theirs builds, with its 62 500 steps of warm-up.
Guidance scale/power of the row: 6.0/0.7.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 4, 70.6 GiB. v5e:16x16: 13.5 GiB.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "ar"
    config.model.depth = 24
    config.model.width = 1024
    config.model.mlp_width = 2816
    config.train.loop.steps = 500_000
    config.sample.guidance_scale = 6.0
    config.sample.guidance_power = 0.7
    return config
