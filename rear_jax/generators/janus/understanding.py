"""The understanding side of Janus-Pro (arXiv:2501.17811): an image and a question in, text out.

The features of an image's patches take the place of placeholders in the question, the language model reads all of it,
and its `lm_head` answers token by token, over the same cache of keys and values by which it draws images.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rear_jax import guidance
from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.janus.network import EPSILON, rotation_table
from rear_jax.generators.janus.vision import Aligner, VisionTower
from rear_jax.generators.rotary import Block, linear, normal, rms_norm
from rear_jax.generators.stack import run_blocks


class Understanding(nn.Module):
    """The image tower, the aligner, and the language model with its `lm_head`.

    Attributes:
      width, depth, heads, mlp_width: of the language model.
      vocabulary_size: V, tokens of text.
      vision_width, vision_depth, vision_heads: of the image tower.
      image_size: S, pixels along each side of an image.
      patch_size: pixels along each side of a patch.
      placeholder_id: the token that an image's features take the place of.
      dtype: of the matrix products.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    vocabulary_size: int
    vision_width: int
    vision_depth: int
    vision_heads: int
    image_size: int
    patch_size: int
    placeholder_id: int
    dtype: Any

    remat, unroll = "none", 1  # of the loop over the blocks: there is no backward pass

    @property
    def num_patches(self) -> int:
        """P, features of an image."""
        return (self.image_size // self.patch_size) ** 2

    def setup(self) -> None:
        of_vision = self.vision_width, self.vision_depth, self.vision_heads
        self.tower = VisionTower(*of_vision, self.image_size, self.patch_size, self.dtype)
        self.aligner = Aligner(self.width, self.dtype)
        self.token_embeddings = self.param("token_embeddings", normal, (self.vocabulary_size, self.width))
        self.blocks = block_of(self)
        self.norm = rms_norm(self.dtype, EPSILON)
        self.lm_head = linear(self.vocabulary_size, self.dtype, out_dtype=jnp.float32)

    def __call__(
        self, pixels: Float[Array, "B S S 3"], ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of the token after each of a text with an image in it; arguments as of `answer`."""
        x = self.embed(self.see(pixels), ids)
        rotation = rotation_table(x.shape[1], self.width // self.heads)
        x, _ = run_blocks(self, x, rotation, mask.astype(bool), dropout=None)
        return self.speak(x)

    def see(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        """Features of images as the language model reads them, float32."""
        return self.aligner(self.tower(pixels)).astype(jnp.float32)

    def embed(self, features: Float[Array, "B P W"], ids: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Input of the language model: of tokens, and of the features in the places of the placeholders, in order."""
        here = ids == self.placeholder_id
        place = jnp.clip(jnp.cumsum(here, axis=1) - 1, 0, features.shape[1] - 1)
        seen = jnp.take_along_axis(features, place[..., None], axis=1)
        return jnp.where(here[..., None], seen, self.read(ids))

    def read(self, ids: Int[Array, "B T"]) -> Float[Array, "B T W"]:
        """Input of the language model at positions that hold tokens of text, float32."""
        return self.token_embeddings[ids].astype(jnp.float32)

    def speak(self, x: Float[Array, "B T W"]) -> Float[Array, "B T V"]:
        """Logits, float32, of the output of the last block."""
        return self.lm_head(self.norm(x))


def block_of(model: Understanding) -> Block:
    """One block, as every layer of the language model has it."""
    return Block(model.width, model.heads, model.mlp_width, 0.0, model.dtype, epsilon=EPSILON)


class Answering(NamedTuple):
    """How an answer is drawn; hashable.

    Attributes:
      end_id: the token that ends an answer.
      max_tokens: M, of an answer at most, the end token among them.
      temperature: divides the logits; 0 takes the most probable token.
      top_p: keep the most probable tokens up to this probability; 1 keeps all.
    """

    end_id: int
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


class _Said(NamedTuple):
    """Where decoding is: tokens drawn so far, whether each row has ended, the past, and the logits if they are kept."""

    count: Int[Array, ""]
    ids: Int[Array, "B M"]
    ended: Bool[Array, " B"]
    cache: Any
    logits: Float[Array, "B M V"] | None


def answer(
    model: Understanding,
    params: Any,
    pixels: Float[Array, "B S S 3"],
    ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: PRNGKeyArray,
    settings: Answering,
    *,
    wanted: Bool[Array, " B"] | None = None,
    return_logits: bool = False,
) -> Any:
    """Answers a question about each image: one compiled program, which ends when the last answer has ended.

    The draw of token n of a row uses `fold_in(its key, n)`, so a row does not depend on the batch it is in.

    Args:
      model: the network.
      params: its parameters.
      pixels: normalised images, see `preprocess`.
      ids: questions, padded on the left, each with `num_patches` placeholders.
      mask: False on padding.
      keys: one random key per row; temperature 0 does not use them.
      settings: of the drawing.
      wanted: rows that are answered; None = all.
      return_logits: also return the logits that each token was drawn from, 0 after the end of all rows.

    Returns:
      tokens [B, M] int32, `end_id` from the end of an answer on, or (tokens, logits [B, M, V] float32).
    """
    cached = CachedGenerator(model)
    weights, block = cached.prepare(params), block_of(model)
    (batch, length), room = ids.shape, settings.max_tokens
    rotations = rotation_table(length + room, model.width // model.heads)
    visible = jnp.pad(mask.astype(bool), ((0, 0), (0, room)), constant_values=True)

    def run(x, rotation, position, cache):
        """Logits after the last of some new positions."""
        inputs = [(rotation, visible)] * model.depth
        x, cache = cached.run_layers(block, weights, x, inputs, cache, position)
        return cached.call(weights, "speak", x[:, -1:])[:, 0], cache

    def draw(said: _Said, logits: Float[Array, "B V"]) -> _Said:
        """Adds one token to each row."""
        count = said.count
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        token = guidance.draw(own, logits, temperature=settings.temperature, top_p=settings.top_p)
        token = jnp.where(said.ended, settings.end_id, token)
        kept = said.logits if said.logits is None else said.logits.at[:, count].set(logits)
        ended = said.ended | (token == settings.end_id)
        return _Said(count + 1, said.ids.at[:, count].set(token), ended, said.cache, kept)

    def step(said: _Said) -> _Said:
        """Reads the last token of each row and draws the next one."""
        position = length + said.count - 1
        x = cached.call(weights, "read", jax.lax.dynamic_slice_in_dim(said.ids, said.count - 1, 1, axis=1))
        logits, cache = run(x, rotations.at(position).at(None), position, said.cache)
        return draw(said._replace(cache=cache), logits)

    x = cached.call(weights, "embed", cached.call(weights, "see", pixels), ids)
    logits, cache = run(x, rotations.at(slice(length)), 0, cached.new_cache(batch, length + room))
    said = _Said(
        count=jnp.int32(0),
        ids=jnp.full((batch, room), settings.end_id, jnp.int32),
        ended=jnp.zeros(batch, bool) if wanted is None else ~wanted,
        cache=cache,
        logits=jnp.zeros((batch, room, model.vocabulary_size)) if return_logits else None,
    )
    said = jax.lax.while_loop(lambda said: (said.count < room) & ~jnp.all(said.ended), step, draw(said, logits))
    return (said.ids, said.logits) if return_logits else said.ids
