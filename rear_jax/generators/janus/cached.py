"""Cached decoding of Janus-Pro's transformer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.cached_attention import KeyValues
from rear_jax.generators.interface import Tokens
from rear_jax.generators.janus.network import block_of


class Cache(NamedTuple):
    """The past of a batch.

    Attributes:
      layers: keys and values of each.
      visible: [B, S] bool, False where a prompt is padded.
    """

    layers: list[KeyValues]
    visible: jax.Array


class CachedJanus(CachedGenerator):
    """The cached form of `JanusTransformer`. Conditions are `Tokens` of up to `prompt_length` positions.

    Guidance is u + g (c - u) of conditional and unconditional logits; g = 5 is the published scale.
    """

    @property
    def prefix_length(self) -> int:
        return self.model.prompt_length

    def with_unconditional(self, weights, conditions, rows):
        """Each prompt without its words, after all prompts."""
        nothing = self.model.unconditional(conditions)
        both = Tokens(*(jnp.concatenate(pair) for pair in zip(conditions, nothing, strict=True)))
        return both, jnp.concatenate([rows, rows + len(conditions.ids)])

    def condition(self, weights, conditions, positions):
        """Rotary embeddings of the positions. The prompt is not among them: it was read by `prefill`."""
        return self.model.rotations.at(positions)

    def new_cache(self, batch: int, length: int) -> Cache:
        """One empty past per layer, all of it visible."""
        return Cache(super().new_cache(batch, length), jnp.ones((batch, length), bool))

    def grow_cache(self, cache: Cache, length: int) -> Cache:
        """The same past with room for `length` positions."""
        more = length - cache.visible.shape[1]
        visible = jnp.pad(cache.visible, ((0, 0), (0, more)), constant_values=True)
        return Cache(super().grow_cache(cache.layers, length), visible)

    def prefill(self, weights, conditions, rows, cache):
        """Reads the prompt, padded to `prompt_length`; returns the logits of the first code."""
        padding = self.prefix_length - self.model.require_length(conditions)
        conditions = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (padding, 0))), conditions)
        x = self.call(weights, "embed_text", conditions.ids)[rows]
        cache = Cache(cache.layers, self.model.visible(conditions, cache.visible.shape[1])[rows])
        return self._run(weights, x, self.condition(weights, conditions, jnp.arange(self.prefix_length)), 0, cache)

    def step(self, weights, conditioning, rows, codes, position, cache):
        """Reads one code per sequence, see `CachedGenerator.step`; conditioning: rotation [D/2] at this position alone.

        `rows` are not needed: the prompts are in the cache.
        """
        x = self.call(weights, "embed_codes", codes[:, None])
        return self._run(weights, x, conditioning.at(None), position, cache)

    def _run(self, weights, x, rotation, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        inputs = [(rotation, cache.visible)] * len(cache.layers)
        x, layers = self.run_layers(block_of(self.model), weights, x, inputs, cache.layers, position)
        hidden = self.call(weights, "final_norm", x[:, -1:])
        return self.call(weights, "head", hidden)[:, 0], Cache(layers, cache.visible)
