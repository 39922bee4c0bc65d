"""Floats to 8-bit images as the authors of each family do it: scores are of what is left after that."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Rule = Callable[[jax.Array], jax.Array]


def truncate(images: jax.Array) -> jax.Array:
    """Floats in [0, 1], of any shape, to uint8 as RAR's code does it: 255 clip(x, 0, 1) without its fraction."""
    return (255.0 * jnp.clip(images.astype(jnp.float32), 0.0, 1.0)).astype(jnp.uint8)


def round_half_up(images: jax.Array) -> jax.Array:
    """Floats in [0, 1], of any shape, to uint8 as LlamaGen's code does it.

    That is clip(127.5 y + 128, 0, 255) without its fraction, of y in [-1, 1]; with x = (y + 1) / 2 it is 255 x + 0.5.
    """
    return jnp.clip(255.0 * images.astype(jnp.float32) + 0.5, 0.0, 255.0).astype(jnp.uint8)


GENERATORS: dict[str, Rule] = {  # by config.model.name, for samples
    "rar": truncate,
    "llamagen": round_half_up,
    "alitok": truncate,  # its sampling code descends from RAR's
}
TOKENIZERS: dict[str, Rule] = {  # by config.tokenizer.name, for reconstructions
    "maskgit_vqgan": truncate,
    "vqgan_plus": truncate,
    "llamagen_vq": round_half_up,
    "titok": truncate,
    "alitok": truncate,
}
