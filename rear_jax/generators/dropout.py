"""Dropout by a counter-based hash: whether an element is dropped is a function of where it is.

An element has a place: the seed and step of the run, the number of its sequence in the batch, the layer, the site in
the layer, and its index there. The mask is a hash of these. So it is the same on any mesh, in any number of
microbatches, on every backend, and inside a kernel, which could not draw the numbers of jax.random; and no mask is
stored for the backward pass, which computes it again.

The hash is lowbias32 (Chris Wellons, https://nullprogram.com/blog/2018/07/31/, which measures its bias), with two words
that depend on the place mixed in. It is for dropout: it has good statistics, which tests check, and no claim to
anything more. It is no cryptography, and other random numbers are drawn by jax.random.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

M1, M2, GOLDEN = 0x7FEB352D, 0x846CA68B - 2**32, 0x9E3779B9 - 2**32  # of lowbias32, and the golden ratio; as int32
ROW = 2048  # positions that a row of attention weights has room for


class Dropout(NamedTuple):
    """Where a network drops now: one pair of words for each sequence.

    Attributes:
      words: [B, 2], or with leading axes.
    """

    words: jax.Array

    @classmethod
    def of(cls, key: PRNGKeyArray, sequences: Int[Array, " B"]) -> "Dropout":
        """That of a step, whose random key is `key`, for sequences of these numbers in the batch of the step."""
        words = lax.bitcast_convert_type(jax.random.bits(key, (2,)), jnp.int32)
        return cls(folded(words, sequences))

    def at(self, number: Int[Array, ""] | int) -> "Dropout":
        """That of one of the parts of a place: of a layer, or of a site in a layer."""
        return Dropout(folded(self.words, jnp.int32(number)))

    def split(self, count: int) -> "Dropout":
        """Those of `count` parts, stacked in front: entry n is `at(n)`."""
        return jax.vmap(self.at)(jnp.arange(count))

    def of_heads(self, heads: int) -> Int32[Array, "B H 2"]:
        """The words of each head's attention weights."""
        return folded(self.words[:, None], jnp.arange(heads))


def at(dropout: Dropout | None, number: int) -> Dropout | None:
    """`dropout.at(number)`, where there is dropout."""
    return None if dropout is None else dropout.at(number)


def drop(x: Float[Array, "B ..."], rate: float, dropout: Dropout | None) -> Float[Array, "B ..."]:
    """Inverted dropout, scaled up in float32; x itself where `dropout` is None or the rate is 0."""
    if dropout is None or not rate:
        return x
    index, stride = jnp.zeros((1,) * x.ndim, jnp.int32), 1
    for axis in reversed(range(1, x.ndim)):
        index = index + stride * lax.broadcasted_iota(jnp.int32, x.shape, axis)
        stride *= x.shape[axis]
    words = dropout.words.reshape(x.shape[0], *(1,) * (x.ndim - 1), 2)
    scaled = x.astype(jnp.promote_types(x.dtype, jnp.float32)) / (1.0 - rate)
    return jnp.where(kept(index, words[..., 0], words[..., 1], rate), scaled, 0.0).astype(x.dtype)


def drop_weights(weights: Float[Array, "B H T S"], rate: float, dropout: Dropout) -> Float[Array, "B H T S"]:
    """The same for attention weights."""
    words = dropout.of_heads(weights.shape[1])[:, :, None, None]
    row, column = (lax.broadcasted_iota(jnp.int32, weights.shape[2:], axis) for axis in (0, 1))
    scaled = weights.astype(jnp.promote_types(weights.dtype, jnp.float32)) / (1.0 - rate)
    keep = kept(row * ROW + column, words[..., 0], words[..., 1], rate)
    return jnp.where(keep, scaled, 0.0).astype(weights.dtype)


def kept(
    index: Int32[Array, "..."], word0: Int32[Array, "..."], word1: Int32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Whether elements survive: a hash of their index at a place and of the place's words. It runs in kernels too."""
    x = index + word0
    x = (x ^ _shifted(x, 16)) * jnp.int32(M1)
    x = (x ^ _shifted(x, 15) ^ word1) * jnp.int32(M2)
    return x >= jnp.int32(round(rate * 2**32) - 2**31)


def folded(words: Int32[Array, "*#n 2"], number: Int[Array, "*#n"]) -> Int32[Array, "*n 2"]:
    """The words of the part `number` of a place, whose own are `words`."""
    number = number.astype(jnp.int32)
    first = _mixed(words[..., 0] + number * jnp.int32(GOLDEN))
    second = _mixed(words[..., 1] ^ _mixed(number + jnp.int32(GOLDEN)))
    return jnp.stack([first, second], axis=-1)


def _mixed(x: jax.Array) -> jax.Array:
    """lowbias32."""
    x = (x ^ _shifted(x, 16)) * jnp.int32(M1)
    x = (x ^ _shifted(x, 15)) * jnp.int32(M2)
    return x ^ _shifted(x, 16)


def _shifted(x: jax.Array, bits: int) -> jax.Array:
    """To the right, zeros coming in."""
    return lax.shift_right_logical(x, jnp.full_like(x, bits))
