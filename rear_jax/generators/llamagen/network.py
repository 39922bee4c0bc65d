"""LlamaGen's transformer, class-conditional and text-conditional (arXiv 2406.06525).

A causal LLaMA-style transformer over [condition, code_1 .. code_N-1]: the condition takes one position (class) or
`caption_length` of them (text), and the output at the position before code n predicts code n. Its blocks, in
`generators/rotary.py`, have no biases. The rotary embeddings are those of each code's row and column; they are zero at
the positions of the condition.

Training runs `LlamaGenTransformer.__call__` on whole sequences; decoding is in `cached.py`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rear_jax.generators.dropout import Dropout, at, drop
from rear_jax.generators.heads import Rotation, grid_angles, rotation_of
from rear_jax.generators.interface import Captions, Features, Generator
from rear_jax.generators.rotary import TOKENS, Block, linear, normal, rms_norm
from rear_jax.generators.stack import run_blocks
from rear_jax.runtime.precision import in_float32

CONDITIONS = ("class", "text")


def rotation_table(num_codes: int, head_size: int, prefix_length: int) -> Rotation:
    """Rotations of all positions: zeros for the prefix, then the codes of a square grid, row by row."""
    return rotation_of(grid_angles(num_codes, head_size), zeros=prefix_length)


class LlamaGenTransformer(Generator):
    """The whole generator, of a square number of codes; `dropout` is the rate on attention and SwiGLU output.

    Attributes:
      token_dropout: rate on the input of the first block.
      condition: 'class' (labels [B]) or 'text' (`Captions`); with 'text' there are no classes.
      caption_length: T, positions of a caption.
      caption_dim: width of the caption features.
    """

    depth: int = 12
    heads: int = 12
    mlp_width: int = 2048
    token_dropout: float = 0.1
    condition: str = "class"
    caption_length: int = 120
    caption_dim: int = 2048

    @property
    def prefix_length(self) -> int:
        """Positions before the codes."""
        return 1 if self.condition == "class" else self.caption_length

    @property
    def rotations(self) -> Rotation:
        """Of all positions."""
        return rotation_table(self.num_codes, self.width // self.heads, self.prefix_length)

    def setup(self):
        self.code_embeddings = self.param("code_embeddings", normal, (self.codebook_size, self.width))
        if self.condition == "class":
            self.class_embeddings = self.param("class_embeddings", normal, (self.num_classes + 1, self.width))
        else:
            scaled = nn.initializers.normal(self.caption_dim**-0.5)
            self.null_caption = self.param("null_caption", scaled, (self.caption_length, self.caption_dim))
            self.caption_fc1 = linear(self.width, self.dtype)
            self.caption_fc2 = linear(self.width, self.dtype)
        self.blocks = block_of(self)
        self.norm = rms_norm(self.dtype)
        self.lm_head = linear(self.codebook_size, self.dtype, kernel_init=nn.initializers.zeros, out_dtype=jnp.float32)

    def __call__(
        self, codes: Int[Array, "B N"], conditions: Int[Array, " B"] | Captions, *, dropout: Dropout | None = None
    ) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context; code n is read only by predictions of later codes.
          conditions: class of each sequence (`num_classes` where it is dropped), or its caption.
          dropout: where elements are dropped; None = nowhere.
        """
        prefix = self.embed_conditions(conditions)
        x = jnp.concatenate([prefix, self.code_embeddings[codes[:, :-1]]], axis=1)  # [B, T + N - 1, W]
        x = drop(x, self.token_dropout, at(dropout, TOKENS))
        rotation, visible = self.rotations.at(slice(x.shape[1])), self.visible(conditions, x.shape[1])
        x, _ = run_blocks(self, x, rotation, visible, dropout=dropout)
        return Features(self.head(x[:, self.prefix_length - 1 :]))

    def embed_conditions(self, conditions: Int[Array, " B"] | Captions) -> Float[Array, "B T W"]:
        """Input of the transformer at the positions before the codes."""
        if self.condition == "class":
            return self.class_embeddings[conditions][:, None]
        hidden = in_float32(nn.gelu, self.dtype)(self.caption_fc1(conditions.features))  # by tanh
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
        return self.lm_head(self.norm(x))


def block_of(model: LlamaGenTransformer) -> Block:
    """One block, as every layer of the model has it."""
    return Block(model.width, model.heads, model.mlp_width, model.dropout, model.dtype, attention=model.attention)
