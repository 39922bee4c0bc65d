"""Causal transformer blocks with rotary embeddings, RMSNorm and SwiGLU: what LlamaGen's and AliTok's generators share.

Positions of the condition have an all-zero rotation instead of none: their queries and keys vanish, so they attend
evenly to what they see and are attended to with score 0.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rear_jax.errors import RearError
from rear_jax.generators.attention import KeyValues, apply_dropout, attend, causal_attention, update_key_values
from rear_jax.generators.layers import HeadsLinear, normal
from rear_jax.runtime.precision import Linear, in_float32

BASE = 10_000.0  # of the frequencies


class Rotation(NamedTuple):
    """Rotary embedding of T positions, [T, H/2] each for heads of size H: one entry for each pair of features.

    With a leading batch axis, [B, T, H/2], each sequence has positions of its own.
    """

    cos: jax.Array
    sin: jax.Array

    def at(self, positions: Any) -> "Rotation":
        """The entries of some positions, an index or a slice of the leading axis; None adds one of length one."""
        return Rotation(self.cos[positions], self.sin[positions])


def line_angles(length: int, head_size: int) -> np.ndarray:
    """Angles [length, H/2] of positions 0, 1, ... on a line."""
    return np.outer(np.arange(length), _frequencies(head_size))


def grid_angles(num_codes: int, head_size: int, *, first: int = 0) -> np.ndarray:
    """Angles [num_codes, H/2] of a square grid, row by row; both axes count from `first`.

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
    """`zeros` positions without queries and keys, then one for each row of the angles [T, H/2]."""
    table = [np.pad(part(angles), ((zeros, 0), (0, 0))) for part in (np.cos, np.sin)]
    return Rotation(*(jnp.asarray(part, jnp.float32) for part in table))


def _frequencies(size: int) -> np.ndarray:
    """[size/2], falling from 1."""
    return BASE ** -(np.arange(0, size, 2) / size)


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Turns the interleaved pairs (0, 1), (2, 3), ... of each head in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation.cos[..., None, :], rotation.sin[..., None, :]  # [T, 1, H/2] or [B, T, 1, H/2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def linear(
    features: int, dtype: Any, *, bias: bool = False, kernel_init: Any = normal, out_dtype: Any = None
) -> Linear:
    """A linear layer with the family's initialisation."""
    return Linear(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, out_dtype=out_dtype)


def rms_norm(dtype: Any) -> nn.RMSNorm:
    """RMSNorm with the family's epsilon; computed in float32."""
    return nn.RMSNorm(epsilon=1e-5, dtype=dtype)


class Block(nn.Module):
    """One transformer block: attention and SwiGLU, each behind an RMSNorm and added to its input.

    Attributes:
      width, heads, mlp_width: of the transformer.
      dropout: rate on attention output and SwiGLU output.
      dtype: of the matrix products.
      attention_dropout: rate on attention weights.
      attention_bias: whether the linear layers of the attention have biases.
      normalize_heads: whether each head's queries and keys pass an RMSNorm before they are rotated.
      attention: the kernel, one of `attention_kernels.KERNELS`.
    """

    width: int
    heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    attention_dropout: float = 0.0
    attention_bias: bool = False
    normalize_heads: bool = False
    attention: str = "auto"

    def setup(self):
        self.attention_norm = rms_norm(self.dtype)
        self.qkv = HeadsLinear(self.heads, self.dtype, self.attention_bias, normal)
        if self.normalize_heads:
            self.q_norm = rms_norm(self.dtype)
            self.k_norm = rms_norm(self.dtype)
        self.proj = linear(self.width, self.dtype, bias=self.attention_bias)
        self.mlp_norm = rms_norm(self.dtype)
        self.gate = linear(self.mlp_width, self.dtype)
        self.up = linear(self.mlp_width, self.dtype)
        self.down = linear(self.width, self.dtype)

    def __call__(
        self, x: Float[Array, "B T W"], rotation: Rotation, visible: Bool[Array, "B T"] | None, *, train: bool
    ) -> Float[Array, "B T W"]:
        """Whole sequences, causal; `train` switches dropout on."""
        q, k, v = self._heads(x, rotation)
        key = self.make_rng("dropout") if train and self.attention_dropout else None
        mixed = causal_attention(
            q, k, v, kernel=self.attention, visible=visible, dropout=self.attention_dropout, key=key
        )
        return self._residuals(x, mixed, train=train)

    def step(
        self,
        x: Float[Array, "B T W"],
        rotation: Rotation,
        visible: Bool[Array, "B S"] | None,
        past: KeyValues,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B T W"], KeyValues]:
        """T new positions from `position` on, seeing themselves and what is visible of the past."""
        q, k, v = self._heads(x, rotation)
        past = update_key_values(past, k, v, position)
        return self._residuals(x, attend(q, past, position, visible), train=False), past

    def _heads(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries and keys, and values, each [B, T, heads, W / heads]."""
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.normalize_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotation), rotate(k, rotation), v

    def _residuals(self, x: jax.Array, mixed: jax.Array, *, train: bool) -> jax.Array:
        """Adds the attention output `mixed` [B, T, heads, W / heads] and the SwiGLU to x."""
        x = x + self._drop(self.proj(mixed.reshape(x.shape)), train)
        h = self.mlp_norm(x)
        gated = in_float32(lambda gate, up: nn.silu(gate) * up, self.dtype)(self.gate(h), self.up(h))
        return x + self._drop(self.down(gated), train)

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return apply_dropout(self.make_rng("dropout"), x, self.dropout) if train and self.dropout else x
