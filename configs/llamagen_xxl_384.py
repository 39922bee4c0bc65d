"""LlamaGen-XXL on ImageNet-1k at 384 pixels, 24 x 24 codes (arXiv 2406.06525): FID 2.34 in the authors' table.

    python -m rear_jax.main --config=configs/llamagen_xxl_384.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vq_ds16_c2i.pt

1.4B parameters.
300 epochs = 1 501 200 steps of 256 ten-crop code sequences of the published VQ-16, at a constant learning rate.
Samples are decoded at 384 pixels and resized to 256, as for the table's FID; sample.image_size = 0 keeps 384.
arXiv 2512.19680 gives the published weights FID 2.37, IS 252.16, and 14.36, 86.55 without guidance.
With --config.init_from=c2i_XXL_384.pt --job=sample,evaluate it samples from the published weights.
Not run here: the expected result is the table's.
8 A100 of 80 GB: accumulation 4, 56.6 GiB. v5e:16x16: 3.3 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=384)
    config.model.width = 1536
    config.model.depth = 48
    config.model.heads = 24
    config.model.mlp_width = 4096
    config.sample.guidance_scale = 1.75
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
