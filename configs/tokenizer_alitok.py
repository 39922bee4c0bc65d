"""AliTok's tokenizer on ImageNet-1k at 256 pixels (arXiv 2506.05289): 17 prefix codes and 256 in an order to be read.

    python -m rear_jax.main --config=configs/tokenizer_alitok.py:1 --workdir=DIR1
    python -m rear_jax.main --config=configs/tokenizer_alitok.py:2 --workdir=DIR2 \
        --config.tokenizer_training.init_from=DIR1/tokenizer

389.9M parameters, codes of 4096 with width 32. The published network is `AliTok.pth`: give it as tokenizer_from.
As in the paper, stage 1 trains encoder and codebook against a decoder that draws each patch from the codes up to its
own; stage 2 keeps both and trains a new decoder that sees everything, after 32 buffer tokens.
Not known here, and so not as published: the loss weights, optimiser and lengths of both stages, for which TiTok's
second stage stands (tokenizer_titok_b64.py), and the auxiliary loss of stage 1, which is left out.
Not run here.
Stage 1: 8 A100 of 80 GB: 29.7 GiB.
Stage 2: 8 A100 of 80 GB: 21.8 GiB.
"""

from rear_jax.config import alitok
from rear_jax.config.experiments import titok_imagenet
from rear_jax.errors import RearError


def get_config(stage="1"):
    config = titok_imagenet("2")
    config.tokenizer = alitok()
    config.tokenizer.dtype = "bfloat16"
    vq = config.tokenizer_training
    if stage == "1":
        config.tokenizer.causal_decoder = True
        config.tokenizer.buffer_tokens = 0
        vq.trained = "all"
        vq.commitment_weight = 0.25
    elif stage == "2":
        vq.init_parts = "codes"
    else:
        raise RearError(f"AliTok is trained in stages 1 and 2, not {stage!r}: end --config=FILE with :1 or :2.")
    return config
