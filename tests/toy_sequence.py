"""TiTok and AliTok tokenizers at a size that tests can afford."""

import jax
import numpy as np

from rear_jax import config as configs
from rear_jax import tokenizers

SIZES = {"encoder_width": 16, "encoder_depth": 2, "encoder_heads": 2} | {
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "codebook_size": 12,
    "codebook_dim": 4,
    "dtype": "float32",
}
PROXY = {  # that of tests/toy_config.py with a level less
    "proxy_codebook_size": 16,
    "proxy_dim": 4,
    "proxy_channels": 8,
    "proxy_channel_mult": (1, 1, 1),
    "proxy_res_blocks": 1,
}
TITOK = SIZES | PROXY | {"patch_size": 4, "num_latent_tokens": 5}
ALITOK = SIZES | {"patch_size": 4, "prefix_tokens": 3, "buffer_tokens": 2}
KINDS = {
    "codes": (configs.titok, TITOK),
    "pixels": (configs.titok, TITOK | {"predicts": "pixels", "legacy_reshape": False}),
    "alitok": (configs.alitok, ALITOK),
    "alitok_causal": (configs.alitok, ALITOK | {"causal_decoder": True, "buffer_tokens": 0}),
}


def section(kind: str, **changes):
    made, sizes = KINDS[kind]
    made = made()
    made.update(sizes | changes)
    return made


def tiny(kind: str, image_size: int = 16, **changes):
    """A tokenizer with weights drawn without running `init`."""
    tokenizer = tokenizers.build(section(kind, **changes), image_size)
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return tokenizer, jax.tree.map(draw, tokenizers.shapes(tokenizer))
