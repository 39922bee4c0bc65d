"""A small TiTok on Fashion-MNIST: 32 codes of an image that stand for no place in it, and a reAR generator on them.

    python -m rear_jax.main --config=configs/fashion_titok.py --workdir=/tmp/fashion_titok

The quickstart with another tokenizer, in under ten minutes on two CPU cores: a ViT of 4 blocks reads 16 patches and 32
latent tokens, a second one draws the pixels from the tokens' codes alone. See benchmarks/RESULTS.md for its scores
beside those of the quickstart's grid of codes.
"""

from rear_jax.config import titok
from rear_jax.config.experiments import fashion_mnist_sequence


def get_config():
    config = fashion_mnist_sequence()
    config.tokenizer = tokenizer = titok()
    tokenizer.codebook_size = 256
    tokenizer.num_latent_tokens = 32
    tokenizer.patch_size = 8
    tokenizer.encoder_width = tokenizer.decoder_width = 128
    tokenizer.encoder_depth = tokenizer.decoder_depth = 4
    tokenizer.encoder_heads = tokenizer.decoder_heads = 4
    tokenizer.legacy_reshape = False
    tokenizer.predicts = "pixels"

    vq = config.tokenizer_training
    vq.loop.steps = 2400
    vq.loop.picture_every = vq.loop.checkpoint_every = 1200
    return config
