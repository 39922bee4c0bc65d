"""LlamaGen-XL on ImageNet-1k at 384 pixels, 24 x 24 codes (arXiv 2406.06525): FID 2.62 in the authors' table.

    python -m rear_jax.main --config=configs/llamagen_xl_384.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vq_ds16_c2i.pt

775M parameters.
300 epochs = 1 501 200 steps of 256 ten-crop code sequences of the published VQ-16, at a constant learning rate.
Samples are decoded at 384 pixels and resized to 256, as for the table's FID; sample.image_size = 0 keeps 384.
arXiv 2512.19680 gives the published weights FID 2.79, IS 286.88, and 15.55, 79.16 without guidance.
With --config.init_from=c2i_XL_384.pt --job=sample,evaluate it samples from the published weights.
Not run here: the expected result is the table's.
8 A100 of 80 GB: accumulation 2, 68.8 GiB. v5e:16x16: 2.2 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=384)
    config.model.width = 1280
    config.model.depth = 36
    config.model.heads = 20
    config.model.mlp_width = 3584
    config.sample.guidance_scale = 1.75
    config.mesh.update(data=1, fsdp=-1)  # parameters, gradients and moments are divided
    return config
