"""RAR-XL on ImageNet-1k at 256 pixels (arXiv 2411.00776): FID 1.50.

    python -m rear_jax.main --config=configs/rar_xl.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

With --config.init_from=rar_xl.bin --job=sample,evaluate it samples from the published weights.
955.4M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN; every sequence in random
order for 200 epochs, then a share that falls to none at epoch 300.
Guidance scale/power/temperature of the row: 6.9/1.5/1.02.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 8, 46.8 GiB. v5e:16x16: 8.4 GiB.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "rar"
    config.model.depth = 32
    config.model.width = 1280
    config.model.mlp_width = 5120
    config.sample.guidance_scale = 6.9
    config.sample.guidance_power = 1.5
    config.sample.temperature = 1.02
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
