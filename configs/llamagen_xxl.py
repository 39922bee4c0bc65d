"""LlamaGen-XXL on ImageNet-1k at 256 pixels, 16 x 16 codes (arXiv 2406.06525): no row in the authors' table.

    python -m rear_jax.main --config=configs/llamagen_xxl.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vq_ds16_c2i.pt

1.4B parameters.
300 epochs = 1 501 200 steps of 256 ten-crop code sequences of the published VQ-16, at a constant learning rate.
Not run here.
8 A100 of 80 GB: accumulation 2, 38.9 GiB. v5e:16x16: 1.8 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=256)
    config.model.width = 1536
    config.model.depth = 48
    config.model.heads = 24
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 1.75
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
