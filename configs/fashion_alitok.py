"""A small AliTok on Fashion-MNIST: 4 prefix codes, then 64 in an order to be read, and a reAR generator on them.

    python -m rear_jax.main --config=configs/fashion_alitok.py:1 --workdir=/tmp/fashion_alitok_1
    python -m rear_jax.main --config=configs/fashion_alitok.py:2 --workdir=/tmp/fashion_alitok \
        --config.tokenizer_training.init_from=/tmp/fashion_alitok_1/tokenizer

The quickstart with another tokenizer and generator, both commands together in under ten minutes on two CPU cores.
Stage 1 trains encoder and codebook against a causal decoder; stage 2 keeps them, trains a decoder that sees everything,
and goes on to codes, generator, samples and scores. See benchmarks/RESULTS.md for its scores beside those of the
quickstart's grid of codes.
"""

from rear_jax.config import alitok, alitok_generator
from rear_jax.config.experiments import fashion_mnist_sequence
from rear_jax.errors import RearError


def get_config(stage="2"):
    config = fashion_mnist_sequence()
    config.tokenizer = tokenizer = alitok()
    tokenizer.codebook_size = 256
    tokenizer.codebook_dim = 12
    tokenizer.l2_normalize = True
    tokenizer.prefix_tokens = 4
    tokenizer.patch_size = 4
    tokenizer.encoder_width = tokenizer.decoder_width = 128
    tokenizer.encoder_depth = tokenizer.decoder_depth = 4
    tokenizer.encoder_heads = tokenizer.decoder_heads = 4
    tokenizer.buffer_tokens = 8

    vq = config.tokenizer_training
    vq.loop.steps = 1000
    vq.loop.picture_every = vq.loop.checkpoint_every = 500
    if stage == "1":
        config.jobs = ("tokenizer",)
        tokenizer.causal_decoder = True
        tokenizer.buffer_tokens = 0
    elif stage == "2":
        vq.init_parts = "codes"
        vq.trained = "decoder"
    else:
        raise RearError(f"AliTok is trained in stages 1 and 2, not {stage!r}: end --config=FILE with :1 or :2.")

    small = config.model
    config.model = model = alitok_generator()
    model.update({key: small[key] for key in ("width", "depth", "heads", "dropout", "dtype", "unroll")})
    model.mlp_width = 344
    model.prefix_tokens = 4
    model.token_dropout = 0.0
    return config
