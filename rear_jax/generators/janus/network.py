"""Janus-Pro's transformer, as it generates images from text (arXiv 2501.17811; Janus: arXiv 2410.13848).

A LLaMA over [prompt, code_1 .. code_N-1]: the prompt is text that ends with the token begin_of_image, and the output at
the position before code n predicts code n. A code is read through a small table of its own, which is not the
tokenizer's codebook, and an aligner; it is predicted by a head of two layers. The rotary embeddings are those of
positions on a line, prompt and codes alike. Prompts are padded on the left. begin_of_image always has the same
position, so that a prompt's numbers do not depend on the padding.

What answers questions about images, with an `lm_head`, is not among the parameters here. It shares `embed_text`,
`hidden_states` and the blocks.

Training runs `JanusTransformer.__call__` on whole sequences; decoding is in `cached.py`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.heads import HalfSplitRotation, Rotation, line_angles, rotation_of
from rear_jax.generators.interface import Features, Generator, Tokens
from rear_jax.generators.rotary import Block, linear, normal, rms_norm
from rear_jax.generators.stack import run_blocks
from rear_jax.runtime.precision import gelu

EPSILON = 1e-6  # of RMSNorm


def rotation_table(length: int, head_size: int) -> HalfSplitRotation:
    """Rotations of the positions 0, 1, ... of a text."""
    return HalfSplitRotation(*rotation_of(line_angles(length, head_size), zeros=0))


class JanusTransformer(Generator):
    """The whole generator. The published model has no dropout; `dropout` is the rate on attention and SwiGLU output.

    Attributes:
      vocabulary_size: V, tokens of text.
      code_dim: width of the table of codes.
      prompt_length: T, positions of a prompt at most, begin_of_image among them.
      pad_id: the token that takes the place of a prompt's words where it is dropped.
    """

    width: int = 2048
    mlp_width: int = 5632
    dropout: float = 0.0
    vocabulary_size: int = 102_400
    code_dim: int = 8
    prompt_length: int = 256
    pad_id: int = 100_002

    @property
    def rotations(self) -> HalfSplitRotation:
        """Of all positions: those of the longest prompt, then the codes."""
        return rotation_table(self.prompt_length + self.num_codes, self.width // self.heads)

    def setup(self):
        self.token_embeddings = self.param("token_embeddings", normal, (self.vocabulary_size, self.width))
        of_codes = self.codebook_size, self.code_dim
        self.code_embeddings = self.param("code_embeddings", nn.initializers.normal(1.0), of_codes)
        self.aligner_fc1 = linear(self.width, self.dtype, bias=True)
        self.aligner_fc2 = linear(self.width, self.dtype, bias=True, out_dtype=jnp.float32)
        self.blocks = block_of(self)
        self.norm = rms_norm(self.dtype, EPSILON)
        self.head_fc1 = linear(self.width, self.dtype, bias=True)
        self.head_fc2 = linear(self.codebook_size, self.dtype, bias=True, out_dtype=jnp.float32)

    def __call__(self, codes: Int[Array, "B N"], conditions: Tokens, *, dropout: Dropout | None = None) -> Features:
        """Teacher-forced predictions of every code from the (possibly noisy) codes before it.

        Args:
          codes: the context; code n is read only by predictions of later codes.
          conditions: prompts of up to `prompt_length` tokens, padded on the left, each ending with begin_of_image.
          dropout: where elements are dropped; None = nowhere.

        Raises RearError: the prompts are longer.
        """
        prompt = self.require_length(conditions)
        x = jnp.concatenate([self.embed_text(conditions.ids), self.embed_codes(codes[:, :-1])], axis=1)
        start = self.prompt_length - prompt
        rotation = self.rotations.at(slice(start, start + x.shape[1]))
        x = self.hidden_states(x, rotation, self.visible(conditions, x.shape[1]), dropout=dropout)
        return Features(self.head(x[:, prompt - 1 :]))

    def hidden_states(
        self,
        x: Float[Array, "B S W"],
        rotation: Rotation,
        visible: Bool[Array, "B S"] | None,
        *,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B S W"]:
        """What the language model makes of S positions, after its last norm.

        Args:
          x: what it reads there: of text, of codes, or of anything that stands for words.
          rotation: of these positions, see `rotation_table`.
          visible: positions that others may see; None = all.
          dropout: where elements are dropped; None = nowhere.
        """
        x, _ = run_blocks(self, x, rotation, visible, dropout=dropout)
        return self.norm(x)

    def embed_text(self, ids: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Input of the transformer at positions that hold tokens of text."""
        return self.token_embeddings[ids]

    def embed_codes(self, codes: Int[Array, "B n"]) -> Float[Array, "B n W"]:
        """Input of the transformer at positions that hold codes."""
        return self.aligner_fc2(gelu(self.aligner_fc1(self.code_embeddings[codes])))

    def visible(self, conditions: Tokens, length: int) -> Bool[Array, "B S"]:
        """Which of the first `length` positions others may see: all but the padding of prompts."""
        mask = conditions.mask.astype(bool)
        return jnp.pad(mask, ((0, 0), (0, length - mask.shape[1])), constant_values=True)

    def final_norm(self, x: Float[Array, "B n W"]) -> Float[Array, "B n W"]:
        """The output of the last block as `hidden_states` gives it."""
        return self.norm(x)

    def head(self, hidden: Float[Array, "B n W"]) -> Float[Array, "B n K"]:
        """Logits, float32, of `hidden_states`."""
        return self.head_fc2(gelu(self.head_fc1(hidden)))

    def require_length(self, conditions: Tokens) -> int:
        """How many positions the prompts take; raises RearError where there are more than `prompt_length`."""
        length = conditions.ids.shape[1]
        if length > self.prompt_length:
            raise RearError(
                f"a prompt has {length} tokens, and config.model.prompt_length = {self.prompt_length}: shorten it, or "
                "raise config.model.prompt_length."
            )
        return length

    def unconditional(self, conditions: Tokens) -> Tokens:
        """The same prompts without their words, for guidance and where they are dropped in training.

        Every token becomes `pad_id` and stays visible, but for the first one that is visible (the start) and the last
        (begin_of_image). Padding stays padding.
        """
        ids, mask = conditions.ids, conditions.mask.astype(bool)
        after_first = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
        words = mask & after_first & (jnp.arange(ids.shape[1]) < ids.shape[1] - 1)
        return Tokens(jnp.where(words, jnp.asarray(self.pad_id, ids.dtype), ids), conditions.mask)


def block_of(model: JanusTransformer) -> Block:
    """One block, as every layer of the model has it."""
    sizes = model.width, model.heads, model.mlp_width, model.dropout, model.dtype
    return Block(*sizes, attention=model.attention, epsilon=EPSILON)
