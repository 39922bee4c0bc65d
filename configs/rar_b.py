"""RAR-B on ImageNet-1k at 256 pixels (arXiv 2411.00776): FID 1.95.

    python -m rear_jax.main --config=configs/rar_b.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

With --config.init_from=rar_b.bin --job=sample,evaluate it samples from the published weights.
260.9M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN; every sequence in random
order for 200 epochs, then a share that falls to none at epoch 300.
Guidance scale/power/temperature of the row: 16.0/2.75/1.0.
Not run here: the expected result is the paper's.
Memory as rear_b.py.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "rar"
    config.model.depth = 24
    config.model.width = 768
    config.model.mlp_width = 3072
    config.sample.guidance_scale = 16.0
    config.sample.guidance_power = 2.75
    config.sample.temperature = 1.0
    return config
