"""Cached decoding of AliTok's transformer; prefix tokens are codes like any other here."""

import jax.numpy as jnp

from rear_jax.generators.alitok.network import block_of
from rear_jax.generators.cached import CachedGenerator


class CachedAliTok(CachedGenerator):
    """The cached form of `AliTokTransformer`; the position before the codes is the class."""

    def condition(self, weights, conditions, positions):
        """Rotary embeddings of the positions. The class is not among them: it was read by `prefill`."""
        return self.model.rotations.at(positions)

    def prefill(self, weights, conditions, rows, cache):
        """Reads the class; returns the logits of the first code."""
        x = self.call(weights, "embed_prefix", conditions)[rows]
        return self._run(weights, x, self.condition(weights, conditions, jnp.arange(1)), 0, cache)

    def step(self, weights, conditioning, rows, codes, position, cache):
        """Reads one code per sequence, see `CachedGenerator.step`; conditioning: rotation [H/2] at this position alone.

        `rows` are not needed: the classes are in the cache.
        """
        x = self.call(weights, "embed_code", codes, position)
        return self._run(weights, x, conditioning.at(None), position, cache)

    def _run(self, weights, x, rotation, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        inputs = [(rotation, None)] * len(cache)
        x, cache = self.run_layers(block_of(self.model), weights, x, inputs, cache, position)
        return self.call(weights, "head", x[:, -1:])[:, 0], cache
