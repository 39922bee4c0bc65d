"""What becomes of queries and keys between their projection and their products: each head is normalised, then rotated.

A family has both, one of them, or none. The plain form is here, for queries and keys [B, T, H, D]; the fused kernel
does the same on the chip (`fused_attention.py`).
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.runtime.precision import in_float32

LAYER_EPSILON, RMS_EPSILON = 1e-6, 1e-5
BASE = 10_000.0  # of the frequencies of rotary embeddings


class Norm(NamedTuple):
    """LayerNorm of each head's features, or RMSNorm where `bias` is None.

    Attributes:
      scale, bias: [D] float32.
    """

    scale: jax.Array
    bias: jax.Array | None = None


class HeadNorm(nn.Module):
    """The parameters of a `Norm`."""

    biased: bool

    @nn.compact
    def __call__(self, size: int) -> Norm:
        scale = self.param("scale", nn.initializers.ones, (size,), jnp.float32)
        return Norm(scale, self.param("bias", nn.initializers.zeros, (size,), jnp.float32) if self.biased else None)


class Rotation(NamedTuple):
    """Rotary embedding of T positions, [T, D/2] each for heads of size D: one entry for each pair of features.

    The pairs are interleaved: (0, 1), (2, 3), ... With a leading batch axis, [B, T, D/2], each sequence has positions
    of its own.
    """

    cos: jax.Array
    sin: jax.Array

    def at(self, positions: Any) -> "Rotation":
        """The entries of some positions, an index or a slice of the leading axis; None adds one of length one."""
        return type(self)(self.cos[positions], self.sin[positions])

    @staticmethod
    def distance(size: int) -> int:
        """From the first feature of a pair to the second, in a head of `size` features."""
        return 1

    @staticmethod
    def apart(x: Float[Array, "... D"]) -> tuple[Float[Array, "... D/2"], Float[Array, "... D/2"]]:
        """The first and the second feature of each pair."""
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return pairs[..., 0], pairs[..., 1]

    @staticmethod
    def joined(first: Float[Array, "... D/2"], second: Float[Array, "... D/2"]) -> Float[Array, "... D"]:
        """The features in their places: what `apart` takes apart."""
        return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


class HalfSplitRotation(Rotation):
    """The same where a feature of the first half of a head pairs with one of the second: (0, D/2), (1, D/2 + 1), ..."""

    __slots__ = ()

    @staticmethod
    def distance(size: int) -> int:
        """From the first feature of a pair to the second, in a head of `size` features."""
        return size // 2

    @staticmethod
    def apart(x: Float[Array, "... D"]) -> tuple[Float[Array, "... D/2"], Float[Array, "... D/2"]]:
        """The first and the second feature of each pair."""
        first, second = jnp.split(x, 2, axis=-1)
        return first, second

    @staticmethod
    def joined(first: Float[Array, "... D/2"], second: Float[Array, "... D/2"]) -> Float[Array, "... D"]:
        """The features in their places: what `apart` takes apart."""
        return jnp.concatenate([first, second], axis=-1)


class Preparation(NamedTuple):
    """All of it; a part that is None is left out.

    Attributes:
      queries, keys: the norms, both or none.
      rotation: of both.
    """

    queries: Norm | None = None
    keys: Norm | None = None
    rotation: Rotation | None = None

    def apply(
        self, qkv: Float[Array, "B T 3 H D"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H D"]]:
        """Queries and keys as they are multiplied, and values."""
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.queries is not None:
            q, k = normalised(q, self.queries), normalised(k, self.keys)
        if self.rotation is not None:
            q, k = rotate(q, self.rotation), rotate(k, self.rotation)
        return q, k, v


def normalised(x: Float[Array, "... D"], norm: Norm) -> Float[Array, "... D"]:
    """The norm of each head, in float32, rounded to the dtype of x."""

    def layer_norm(x, scale, bias):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + LAYER_EPSILON) * scale + bias

    def rms_norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + RMS_EPSILON) * scale

    if norm.bias is None:
        return in_float32(rms_norm, x.dtype)(x, norm.scale)
    return in_float32(layer_norm, x.dtype)(x, norm.scale, norm.bias)


def rotate(x: Float[Array, "B T H D"], rotation: Rotation) -> Float[Array, "B T H D"]:
    """Turns the pairs of features of each head in float32."""
    a, b = rotation.apart(x.astype(jnp.float32))
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]  # [T, 1, D/2] or [B, T, 1, D/2]
    return rotation.joined(a * cos - b * sin, b * cos + a * sin).astype(x.dtype)


def line_angles(length: int, head_size: int) -> np.ndarray:
    """Angles [length, D/2] of positions 0, 1, ... on a line."""
    return np.outer(np.arange(length), _frequencies(head_size))


def grid_angles(num_codes: int, head_size: int, *, first: int = 0) -> np.ndarray:
    """Angles [num_codes, D/2] of a square grid, row by row; both axes count from `first`.

    The first half of the pairs turns with the row, the second with the column.

    Raises RearError: the codes do not form a square, or the head size is not divisible by four.
    """
    side = math.isqrt(num_codes)
    if side**2 != num_codes:
        raise RearError(
            f"this generator needs a square grid of codes, not {num_codes}: use another tokenizer or "
            "config.data.image_size."
        )
    if head_size % 4:
        raise RearError(f"config.model.width / config.model.heads = {head_size}: it must be divisible by 4.")
    frequencies = _frequencies(head_size // 2)
    row, column = np.divmod(np.arange(num_codes), side)
    return np.concatenate([np.outer(first + row, frequencies), np.outer(first + column, frequencies)], axis=1)


def rotation_of(angles: np.ndarray, *, zeros: int) -> Rotation:
    """`zeros` positions without queries and keys, then one for each row of the angles [T, D/2]."""
    table = [np.pad(part(angles), ((zeros, 0), (0, 0))) for part in (np.cos, np.sin)]
    return Rotation(*(jnp.asarray(part, jnp.float32) for part in table))


def _frequencies(size: int) -> np.ndarray:
    """[size/2], falling from 1."""
    return BASE ** -(np.arange(0, size, 2) / size)
