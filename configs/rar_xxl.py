"""RAR-XXL on ImageNet-1k at 256 pixels (arXiv 2411.00776), the largest of its family.

    python -m rear_jax.main --config=configs/rar_xxl.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=maskgit-vqgan-imagenet-f16-256.bin

With --config.init_from=rar_xxl.bin --job=sample,evaluate it samples from the published weights.
1498.5M parameters.
400 epochs = 250 000 steps of 2048 ten-crop code sequences of the published MaskGIT-VQGAN; every sequence in random
order for 200 epochs, then a share that falls to none at epoch 300.
Guidance scale/power/temperature of the row: 8.0/1.2/1.02.
Not run here: the expected result is the paper's.
8 A100 of 80 GB: accumulation 8, 65.2 GiB.
v5e:16x16: 14.9 GiB with --config.mesh.data=-1 --config.mesh.fsdp=8, as 256 does not divide its width.
"""

from rear_jax.config import default


def get_config():
    config = default()
    config.method.name = "rar"
    config.model.depth = 40
    config.model.width = 1408
    config.model.mlp_width = 6144
    config.sample.guidance_scale = 8.0
    config.sample.guidance_power = 1.2
    config.sample.temperature = 1.02
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
