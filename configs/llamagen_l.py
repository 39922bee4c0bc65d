"""LlamaGen-L on ImageNet-1k at 256 pixels, 16 x 16 codes (arXiv 2406.06525): FID 3.80 in the authors' table.

    python -m rear_jax.main --config=configs/llamagen_l.py --workdir=DIR --job=tokenize,train,sample,evaluate \
        --config.tokenizer_from=vq_ds16_c2i.pt

343M parameters.
300 epochs = 1 501 200 steps of 256 ten-crop code sequences of the published VQ-16, at a constant learning rate.
With --config.init_from=c2i_L_256.pt --job=sample,evaluate it samples from the published weights.
Not run here: the expected result is the table's.
8 A100 of 80 GB: 29.9 GiB. v5e:16x16: 7.0 GiB.
"""

from rear_jax.config.experiments import llamagen_imagenet


def get_config():
    config = llamagen_imagenet(image_size=256)
    config.model.width = 1024
    config.model.depth = 24
    config.model.heads = 16
    config.model.mlp_width = 2816
    config.sample.guidance_scale = 2.0
    return config
