"""LlamaGen-3B on ImageNet-1k at 384 pixels, 24 x 24 codes (arXiv 2406.06525): FID 2.18 in the authors' table.

    python -m rear_jax.main --config=configs/llamagen_3b_384.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vq_ds16_c2i.pt

3.1B parameters.
300 epochs = 1 501 200 steps of 256 ten-crop code sequences of the published VQ-16, at a constant learning rate.
Samples are decoded at 384 pixels and resized to 256, as for the table's FID; sample.image_size = 0 keeps 384.
With --config.init_from=c2i_3B_384.pt --job=sample,evaluate it samples from the published weights.
Not run here: the expected result is the table's.
8 A100 of 80 GB: accumulation 4, 56.0 GiB.
v5e:16x16: 10.9 GiB with --config.mesh.data=-1 --config.mesh.fsdp=8, as 256 does not divide its width.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=384)
    config.model.width = 3200
    config.model.depth = 24
    config.model.heads = 32
    config.model.mlp_width = 8704
    config.sample.guidance_scale = 1.65
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
