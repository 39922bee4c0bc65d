"""AliTok-B on ImageNet-1k at 256 pixels (arXiv 2506.05289): FID 1.50, IS 305.9.

    python -m rear_jax.main --config=configs/alitok_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=AliTok.pth

177.0M parameters; a plain autoregressive generator.
With --config.init_from=alitok_b.bin --job=sample,evaluate it samples from the published weights.
800 epochs = 500 000 steps of 2048 ten-crop sequences of the published tokenizer's 273 codes, as the authors'
launcher has it; optimiser and schedule are RAR's, on whose code theirs builds, with its 62 500 steps of warm-up.
Guidance scale/power of the row: 16.0/1.8.
Not run here: the expected result is the paper's.
Memory as rear_alitok_b.py.
"""

from rear_jax.config import alitok, alitok_generator, default


def get_config():
    config = default()
    config.tokenizer = alitok()
    config.model = alitok_generator()
    config.method.name = "ar"
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 2048
    config.train.loop.steps = 500_000
    config.sample.guidance_scale = 16.0
    config.sample.guidance_power = 1.8
    return config
