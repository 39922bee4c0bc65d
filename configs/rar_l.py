"""RAR-L on ImageNet-1k at 256 pixels (arXiv 2411.00776): FID 1.70.

    python -m rear_jax.main --config=configs/rar_l.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

With --config.init_from=rar_l.bin --job=sample,evaluate it samples from the published weights.
461.7M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN; every sequence in random
order for 200 epochs, then a share that falls to none at epoch 300.
Guidance scale/power/temperature of the row: 15.5/2.5/1.02.
Not run here: the expected result is the paper's.
Memory as rear_l.py.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "rar"
    config.model.depth = 24
    config.model.width = 1024
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 15.5
    config.sample.guidance_power = 2.5
    config.sample.temperature = 1.02
    return config
