"""AliTok's transformer, the generator over the codes of the AliTok tokenizer (arXiv 2506.05289), and reAR's on top.

A causal transformer over [class, code_1 .. code_N]; the output at the position before code n predicts code n. The first
codes are the tokenizer's prefix tokens, the others a square grid, row by row. Its blocks, in `generators/rotary.py`,
have biases in the attention, and normalise queries and keys before they rotate them. The rotary embeddings are zero
for the class, those of positions 0, 1, ... for the prefix, and those of row and column for the grid; rows and columns
count from the prefix's length on.

Training runs `AliTokTransformer.__call__` on whole sequences; decoding is in `cached.py`.

The published generators are plain autoregressive ones. The authors of reAR report AR, RAR and reAR on this tokenizer
(arXiv 2510.04450) but released none, so that what is here is this project's reading:

- reAR taps and projects hidden states as in the RAR family: the shallow block where a code is read, the deep block
  where it is predicted. For this the last code is read too, which nothing predicts from.
- RAR permutes all N codes, the prefix among them. A code in a random place keeps the rotation of its own position; as
  nothing else tells the position before it which code comes next, the learned embedding of that code's position is
  added there (`target_positions`), as in the RAR family.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout, at, drop
from rear_jax.generators.heads import Rotation, grid_angles, line_angles, rotation_of
from rear_jax.generators.interface import Features, TappedGenerator
from rear_jax.generators.layers import projectors
from rear_jax.generators.rotary import TOKENS, Block, linear, normal, rms_norm
from rear_jax.generators.stack import run_blocks


def rotation_table(num_codes: int, head_size: int, prefix_tokens: int) -> Rotation:
    """Rotations of all positions: zeros for the class, then the prefix tokens on a line, then the grid.

    Raises RearError: the codes after the prefix do not form a square, or the head size is not divisible by four.
    """
    cells = num_codes - prefix_tokens
    if cells < 0 or math.isqrt(cells) ** 2 != cells:
        raise RearError(
            f"config.model.prefix_tokens = {prefix_tokens} leaves {cells} of the tokenizer's {num_codes} codes, "
            f"no square grid: set it to as many as come before the grid, or to {num_codes} where there is no grid."
        )
    grid = grid_angles(cells, head_size, first=prefix_tokens)
    return rotation_of(np.concatenate([line_angles(prefix_tokens, head_size), grid]), zeros=1)


class AliTokTransformer(TappedGenerator):
    """The whole generator; `dropout` is the rate on attention weights, attention output and SwiGLU output.

    Attributes:
      prefix_tokens: codes before the grid; N counts them too.
      token_dropout: rate on the input of the first block.
      target_positions: whether predictions are told the position that they are for; random orders need it.
    """

    mlp_width: int = 2048
    prefix_tokens: int = 17
    token_dropout: float = 0.1
    target_positions: bool = False

    @property
    def rotations(self) -> Rotation:
        """Of all positions."""
        return rotation_table(self.num_codes, self.width // self.heads, self.prefix_tokens)

    def setup(self):
        self.embeddings = self.param("embeddings", normal, (self.codebook_size + 2 + self.num_classes, self.width))
        if self.target_positions:
            self.target_aware_pos_embed = self.param("target_aware_pos_embed", normal, (self.num_codes, self.width))
        self.blocks = block_of(self)
        self.norm = rms_norm(self.dtype)
        self.lm_head = linear(self.codebook_size, self.dtype, bias=True, out_dtype=jnp.float32)
        if self.taps:
            self.shallow_projector, self.deep_projector = projectors(self)

    def __call__(
        self,
        codes: Int[Array, "B N"],
        labels: Int[Array, " B"],
        orders: Int[Array, "B N"] | None = None,
        *,
        dropout: Dropout | None = None,
    ) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context, in the order of generation; code n is read only by predictions of later codes.
          labels: class of each sequence, `num_classes` where it is dropped.
          orders: position of the n-th code that each sequence generates (RAR); None = as the tokenizer has them.
          dropout: where elements are dropped; None = nowhere.

        Raises:
          ValueError: there are orders, but the model has no target positions.
        """
        if orders is not None and not self.target_positions:
            raise ValueError("orders need target_positions = True")
        if orders is None:
            orders = jnp.arange(self.num_codes)[None]
        read = codes if self.taps else codes[:, :-1]
        x = jnp.concatenate([self.embed_class(labels), self.embeddings[read]], axis=1)  # [B, T, W], T = N or N + 1
        if self.target_positions:
            x = x.at[:, : self.num_codes].add(self.target_aware_pos_embed[orders])
        x = drop(x, self.token_dropout, at(dropout, TOKENS))
        positions = jnp.pad(1 + orders, ((0, 0), (1, 0)))[:, : x.shape[1]]  # [B or 1, T]
        x, tapped = run_blocks(self, x, self.rotations.at(positions), None, dropout=dropout, taps=self.taps)
        logits = self.head(x[:, : self.num_codes])
        if not self.taps:
            return Features(logits)
        shallow, deep = tapped
        return Features(logits, self.shallow_projector(shallow[:, 1:]), self.deep_projector(deep[:, :-1]))

    def embed_class(self, labels: Int[Array, " B"]) -> Float[Array, "B 1 W"]:
        """Class embeddings; the null label is the row after the last class. Row K is the family's unused mask code."""
        return self.embeddings[self.codebook_size + 1 + labels][:, None]

    def embed_prefix(self, labels: Int[Array, " B"]) -> Float[Array, "B 1 W"]:
        """Input of the transformer at the position before the codes."""
        return self.embed_class(labels) + self._target(jnp.int32(0))

    def embed_code(self, codes: Int[Array, " B"], position: Int[Array, ""]) -> Float[Array, "B 1 W"]:
        """Input of the transformer at one position that holds a code, in the tokenizer's order."""
        return self.embeddings[codes][:, None] + self._target(position)

    def head(self, x: Float[Array, "B T W"]) -> Float[Array, "B T K"]:
        """Logits, float32."""
        return self.lm_head(self.norm(x))

    def _target(self, position: Int[Array, ""]) -> Float[Array, " W"] | float:
        """What tells `position` that it predicts the code of the same number."""
        return self.target_aware_pos_embed[position] if self.target_positions else 0.0


def block_of(model: AliTokTransformer) -> Block:
    """One block, as every layer of the model has it."""
    return Block(
        model.width,
        model.heads,
        model.mlp_width,
        model.dropout,
        model.dtype,
        attention_dropout=model.dropout,
        attention_bias=True,
        normalize_heads=True,
        attention=model.attention,
    )
