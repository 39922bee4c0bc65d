"""Causal transformer blocks with rotary embeddings, RMSNorm and SwiGLU: what LlamaGen, AliTok and Janus share.

In the first two generators, positions of the condition have an all-zero rotation instead of none: their queries and
keys vanish, so they attend evenly to what they see and are attended to with score 0.
"""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Bool, Float, Int

from rear_jax.generators.attention import self_attention
from rear_jax.generators.cached_attention import KeyValues, attend_to_past
from rear_jax.generators.dropout import Dropout, at, drop
from rear_jax.generators.heads import HeadNorm, Preparation, Rotation
from rear_jax.generators.layers import HeadsLinear, normal
from rear_jax.generators.stack import keep
from rear_jax.runtime.precision import Linear, in_float32

WEIGHTS, MIXED, OUTPUT = range(3)  # where a block drops: attention weights and output, the SwiGLU's output
TOKENS = -1  # in the place of a layer: the input of the first block


def linear(
    features: int, dtype: Any, *, bias: bool = False, kernel_init: Any = normal, out_dtype: Any = None
) -> Linear:
    """A linear layer with the family's initialisation."""
    return Linear(features, use_bias=bias, dtype=dtype, kernel_init=kernel_init, out_dtype=out_dtype)


def rms_norm(dtype: Any, epsilon: float = 1e-5) -> nn.RMSNorm:
    """RMSNorm, computed in float32."""
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype)


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
      epsilon: of both RMSNorms.
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
    epsilon: float = 1e-5

    def setup(self):
        self.attention_norm = rms_norm(self.dtype, self.epsilon)
        self.qkv = HeadsLinear(self.heads, self.dtype, self.attention_bias, normal)
        if self.normalize_heads:
            self.q_norm = HeadNorm(biased=False)
            self.k_norm = HeadNorm(biased=False)
        self.proj = linear(self.width, self.dtype, bias=self.attention_bias)
        self.mlp_norm = rms_norm(self.dtype, self.epsilon)
        self.gate = linear(self.mlp_width, self.dtype)
        self.up = linear(self.mlp_width, self.dtype)
        self.down = linear(self.width, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T W"],
        rotation: Rotation,
        visible: Bool[Array, "B T"] | None,
        *,
        dropout: Dropout | None,
    ) -> Float[Array, "B T W"]:
        """Whole sequences, causal."""
        qkv, preparation = self._heads(x, rotation)
        rate, where = self.attention_dropout, at(dropout, WEIGHTS)
        mixed = self_attention(qkv, preparation, kernel=self.attention, visible=visible, rate=rate, dropout=where)
        return self._residuals(x, mixed, dropout)

    def step(
        self,
        x: Float[Array, "B T W"],
        rotation: Rotation,
        visible: Bool[Array, "B S"] | None,
        past: KeyValues,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B T W"], KeyValues]:
        """T new positions from `position` on, seeing themselves and what is visible of the past."""
        qkv, preparation = self._heads(x, rotation)
        mixed, past = attend_to_past(qkv, preparation, past, position, visible)
        return self._residuals(x, mixed, None), past

    def _heads(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, Preparation]:
        """Queries, keys and values [B, T, 3, heads, W / heads], and what becomes of the first two."""
        qkv = self.qkv(self.attention_norm(x))
        size, normalize = qkv.shape[-1], self.normalize_heads
        return qkv, Preparation(*((self.q_norm(size), self.k_norm(size)) if normalize else (None, None)), rotation)

    def _residuals(self, x: jax.Array, mixed: jax.Array, dropout: Dropout | None) -> jax.Array:
        """Adds the attention output `mixed` [B, T, W] and the SwiGLU to x."""
        x = x + drop(keep(self.proj(keep(mixed))), self.dropout, at(dropout, MIXED))
        h = self.mlp_norm(x)
        gated = in_float32(lambda gate, up: nn.silu(gate) * up, self.dtype)(keep(self.gate(h)), keep(self.up(h)))
        return x + drop(self.down(gated), self.dropout, at(dropout, OUTPUT))
