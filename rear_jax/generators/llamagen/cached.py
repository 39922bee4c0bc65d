"""Cached decoding of LlamaGen's transformer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.cached_attention import KeyValues
from rear_jax.generators.interface import Captions
from rear_jax.generators.llamagen.network import block_of


class Cache(NamedTuple):
    """The past of a batch.

    Attributes:
      layers: keys and values of each.
      visible: [B, S] bool, False where a caption is padded; None without captions.
    """

    layers: list[KeyValues]
    visible: jax.Array | None


class CachedLlamaGen(CachedGenerator):
    """The cached form of `LlamaGenTransformer`. Conditions are labels [R], or `Captions` that lead with R."""

    @property
    def prefix_length(self) -> int:
        return self.model.prefix_length

    def guides(self, scale: float) -> bool:
        """LlamaGen's scales up to 1 all mean the conditional model alone."""
        return scale > 1.0

    def with_unconditional(self, weights, conditions, rows):
        """The null label, once; or the null caption under the mask of each caption."""
        if self.model.condition == "class":
            return super().with_unconditional(weights, conditions, rows)
        features, mask = conditions
        null = jnp.broadcast_to(weights.rest["null_caption"], features.shape)
        both = Captions(jnp.concatenate([features, null]), jnp.concatenate([mask, mask]))
        return both, jnp.concatenate([rows, rows + len(mask)])

    def condition(self, weights, conditions, positions):
        """Rotary embeddings of the positions. The condition is not among them: it was read by `prefill`."""
        return self.model.rotations.at(positions)

    def new_cache(self, batch: int, length: int) -> Cache:
        """One empty past per layer, all of it visible."""
        visible = None if self.model.condition == "class" else jnp.ones((batch, length), bool)
        return Cache(super().new_cache(batch, length), visible)

    def grow_cache(self, cache: Cache, length: int) -> Cache:
        """The same past with room for `length` positions."""
        visible = cache.visible
        if visible is not None:
            visible = jnp.pad(visible, ((0, 0), (0, length - visible.shape[1])), constant_values=True)
        return Cache(super().grow_cache(cache.layers, length), visible)

    def prefill(self, weights, conditions, rows, cache):
        """Reads the condition; returns the logits of the first code."""
        x = self.call(weights, "embed_conditions", conditions)[rows]
        visible = self.model.visible(conditions, cache.layers[0].keys.shape[2])
        cache = Cache(cache.layers, None if visible is None else visible[rows])
        rotation = self.condition(weights, conditions, jnp.arange(self.prefix_length))
        return self._run(weights, x, rotation, 0, cache)

    def step(self, weights, conditioning, rows, codes, position, cache):
        """Reads one code per sequence, see `CachedGenerator.step`; conditioning: rotation [H/2] at this position alone.

        `rows` are not needed: the conditions are in the cache.
        """
        x = self.call(weights, "embed_code", codes)
        return self._run(weights, x, conditioning.at(None), position, cache)

    def _run(self, weights, x, rotation, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        inputs = [(rotation, cache.visible)] * len(cache.layers)
        x, layers = self.run_layers(block_of(self.model), weights, x, inputs, cache.layers, position)
        return self.call(weights, "head", x[:, -1:])[:, 0], Cache(layers, cache.visible)
