"""LlamaGen's transformer, class-conditional and text-conditional (arXiv 2406.06525).

A causal LLaMA-style transformer over [condition, code_1 .. code_N-1]: the condition takes one position (class) or
`caption_length` of them (text), and the output at the position before code n predicts code n. RMSNorm, SwiGLU, no
biases, and rotary embeddings of each code's row and column. Positions of the condition have an all-zero rotation
instead of none: their queries and keys vanish, so they attend evenly to what they see and are attended to with score 0.

Training runs `LlamaGenTransformer.__call__` on whole sequences; decoding is in `llamagen_decoder.py`.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rear_jax.errors import RearError
from rear_jax.models.attention import KeyValues, apply_dropout, attend, causal_attention, update_key_values
from rear_jax.models.rar import Features, Linear

CONDITIONS = ("class", "text")
ROPE_BASE = 10_000.0

_normal = nn.initializers.normal(0.02)


class Captions(NamedTuple):
    """Text conditions, padded on the left.

    Attributes:
      features: [B, T, D] of a text encoder (T5 in the published models).
      mask: [B, T] bool, False on padding.
    """

    features: jax.Array
    mask: jax.Array


class Rotation(NamedTuple):
    """Rotary embedding of T positions, [T, H/2] each for heads of size H: one entry for each pair of features."""

    cos: jax.Array
    sin: jax.Array


def rotation_table(num_codes: int, head_size: int, prefix_length: int) -> Rotation:
    """Rotations of all positions: zeros for the prefix, then the codes of a square grid, row by row.

    The first half of the pairs turns with the row, the second with the column.

    Raises:
      RearError: the codes do not form a square, or the head size is not divisible by four.
    """
    side = math.isqrt(num_codes)
    if side**2 != num_codes:
        raise RearError(
            f"LlamaGen needs a square grid of codes, not {num_codes}: use another tokenizer or config.data.image_size."
        )
    if head_size % 4:
        raise RearError(f"config.model.width / config.model.heads = {head_size}: LlamaGen's must be divisible by 4.")
    frequencies = ROPE_BASE ** -(np.arange(0, head_size // 2, 2) / (head_size // 2))  # [H/4]
    row, column = np.divmod(np.arange(num_codes), side)
    angles = np.concatenate([np.outer(row, frequencies), np.outer(column, frequencies)], axis=1)  # [N, H/2]
    table = [np.pad(part(angles), ((prefix_length, 0), (0, 0))) for part in (np.cos, np.sin)]
    return Rotation(*(jnp.asarray(part, jnp.float32) for part in table))


def rotate(x: Float[Array, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Turns the interleaved pairs (0, 1), (2, 3), ... of each head in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]  # [T, 1, H/2]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


def linear(features: int, dtype: Any, kernel_init: Any = _normal) -> Linear:
    """A linear layer without bias."""
    return Linear(features, use_bias=False, dtype=dtype, kernel_init=kernel_init)


def rms_norm(dtype: Any) -> nn.RMSNorm:
    """RMSNorm with the family's epsilon; computed in float32."""
    return nn.RMSNorm(epsilon=1e-5, dtype=dtype)


class Block(nn.Module):
    """One transformer block: attention and SwiGLU, each behind an RMSNorm and added to its input."""

    width: int
    heads: int
    mlp_width: int
    dropout: float
    dtype: Any

    def setup(self):
        self.attention_norm = rms_norm(self.dtype)
        self.qkv = linear(3 * self.width, self.dtype)
        self.proj = linear(self.width, self.dtype)
        self.mlp_norm = rms_norm(self.dtype)
        self.gate = linear(self.mlp_width, self.dtype)
        self.up = linear(self.mlp_width, self.dtype)
        self.down = linear(self.width, self.dtype)

    def __call__(
        self, x: Float[Array, "B T W"], rotation: Rotation, visible: Bool[Array, "B T"] | None, *, train: bool
    ) -> Float[Array, "B T W"]:
        """Whole sequences, causal; `train` switches dropout on."""
        q, k, v = self._heads(x, rotation)
        return self._residuals(x, causal_attention(q, k, v, visible=visible), train=train)

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
        qkv = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3, self.heads, self.width // self.heads)
        return rotate(qkv[:, :, 0], rotation), rotate(qkv[:, :, 1], rotation), qkv[:, :, 2]

    def _residuals(self, x: jax.Array, mixed: jax.Array, *, train: bool) -> jax.Array:
        """Adds the attention output `mixed` [B, T, heads, W / heads] and the SwiGLU to x."""
        x = x + self._drop(self.proj(mixed.reshape(x.shape)), train)
        h = self.mlp_norm(x)
        return x + self._drop(self.down(nn.silu(self.gate(h)) * self.up(h)), train)

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return apply_dropout(self.make_rng("dropout"), x, self.dropout) if train and self.dropout else x


class LlamaGenTransformer(nn.Module):
    """The whole generator.

    Attributes:
      codebook_size: K; codes are 0..K-1.
      num_classes: labels are 0..num_classes-1, and `num_classes` itself is the null label; unused with text.
      num_codes: N, codes per image; a square number.
      width, depth, heads, mlp_width: of the transformer.
      dropout: rate on attention output and SwiGLU output.
      token_dropout: rate on the input of the first block.
      condition: 'class' (labels [B]) or 'text' (`Captions`).
      caption_length: T, positions of a caption.
      caption_dim: width of the caption features.
      dtype: of the matrix products; parameters, residual stream, normalisation and softmax are float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      unroll: how many blocks of the layer scan are compiled side by side (`depth` = no loop at all).
    """

    codebook_size: int
    num_classes: int
    num_codes: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    token_dropout: float = 0.0
    condition: str = "class"
    caption_length: int = 120
    caption_dim: int = 2048
    dtype: Any = jnp.float32
    remat: bool = False
    unroll: int = 1

    @property
    def prefix_length(self) -> int:
        """Positions before the codes."""
        return 1 if self.condition == "class" else self.caption_length

    @property
    def rotations(self) -> Rotation:
        """Of all positions."""
        return rotation_table(self.num_codes, self.width // self.heads, self.prefix_length)

    def setup(self):
        self.code_embeddings = self.param("code_embeddings", _normal, (self.codebook_size, self.width))
        if self.condition == "class":
            self.class_embeddings = self.param("class_embeddings", _normal, (self.num_classes + 1, self.width))
        else:
            scaled = nn.initializers.normal(self.caption_dim**-0.5)
            self.null_caption = self.param("null_caption", scaled, (self.caption_length, self.caption_dim))
            self.caption_fc1 = linear(self.width, self.dtype)
            self.caption_fc2 = linear(self.width, self.dtype)
        self.blocks = block_of(self)
        self.norm = rms_norm(self.dtype)
        self.lm_head = linear(self.codebook_size, self.dtype, kernel_init=nn.initializers.zeros)

    def __call__(
        self, codes: Int[Array, "B N"], conditions: Int[Array, " B"] | Captions, *, train: bool = False
    ) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context; code n is read only by predictions of later codes.
          conditions: class of each sequence (`num_classes` where it is dropped), or its caption.
          train: dropout on; needs the 'dropout' random stream.
        """
        prefix = self.embed_conditions(conditions)
        x = jnp.concatenate([prefix, self.code_embeddings[codes[:, :-1]]], axis=1)  # [B, T + N - 1, W]
        if train and self.token_dropout:
            x = apply_dropout(self.make_rng("dropout"), x, self.token_dropout)
        x = self._run_blocks(x, self.visible(conditions, x.shape[1]), train)
        return Features(self.head(x[:, self.prefix_length - 1 :]), None, None)

    def _run_blocks(self, x: jax.Array, visible: jax.Array | None, train: bool) -> jax.Array:
        """All blocks in turn on [B, T + N - 1, W]."""
        rotation = Rotation(*(part[: x.shape[1]] for part in self.rotations))

        def body(block, x, _):
            return block(x, rotation, visible, train=train), None

        scan = nn.scan(
            nn.remat(body, prevent_cse=False) if self.remat else body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            unroll=self.unroll,
        )
        return scan(self.blocks, x, None)[0]

    def embed_conditions(self, conditions: Int[Array, " B"] | Captions) -> Float[Array, "B T W"]:
        """Input of the transformer at the positions before the codes."""
        if self.condition == "class":
            return self.class_embeddings[conditions][:, None]
        hidden = nn.gelu(self.caption_fc1(conditions.features), approximate=True)
        return self.caption_fc2(hidden).astype(jnp.float32)

    def visible(self, conditions: Int[Array, " B"] | Captions, length: int) -> Bool[Array, "B S"] | None:
        """Which of the first `length` positions others may see: all but the padding of captions."""
        if self.condition == "class":
            return None
        mask = conditions.mask.astype(bool)
        return jnp.pad(mask, ((0, 0), (0, length - self.prefix_length)), constant_values=True)

    def embed_code(self, codes: Int[Array, " B"]) -> Float[Array, "B 1 W"]:
        """Input of the transformer at one position that holds a code."""
        return self.code_embeddings[codes][:, None]

    def head(self, x: Float[Array, "B T W"]) -> Float[Array, "B T K"]:
        """Logits, float32."""
        return self.lm_head(self.norm(x)).astype(jnp.float32)


def block_of(model: LlamaGenTransformer) -> Block:
    """One block, as every layer of the model has it."""
    return Block(model.width, model.heads, model.mlp_width, model.dropout, model.dtype)
