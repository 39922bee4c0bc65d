"""Cached decoding of the RAR-family transformer.

The modulation of a block depends on (class, position) alone, not on the codes. So it is computed for whole segments
of positions at once, for each distinct class of the batch and for the null class, by a few large matrix products
before the segment's loop; the loop itself looks rows up. Weights are cut into layers and cast once, outside the loop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.rar.network import block_of


class Conditioning(NamedTuple):
    """Modulation at C positions for R classes.

    Attributes:
      blocks: of each layer, [C, R, 6W].
      head: [C, R, 2W].
    """

    blocks: list[jax.Array]
    head: jax.Array


class CachedRAR(CachedGenerator):
    """The cached form of `RARTransformer`; the two positions before the codes are cls and class."""

    @property
    def prefix_length(self) -> int:
        return 2

    def condition(self, weights, conditions, positions):
        """Modulation of every layer and of the head at the given positions, C leading."""
        seen = self.call(weights, "conditions", conditions, positions).swapaxes(0, 1)  # [C, R, W]
        block = block_of(self.model)
        blocks = [block.apply({"params": layer}, seen, method="modulation") for layer in weights.layers]
        return Conditioning(blocks, self.call(weights, "head_modulation", seen))

    def prefill(self, weights, conditions, rows, cache):
        """Reads cls and class; returns the logits of the first code."""
        conditioning = self.condition(weights, conditions, jnp.arange(2))
        x = self.call(weights, "embed_prefix", conditions)[rows]
        blocks = [modulation[:, rows].swapaxes(0, 1) for modulation in conditioning.blocks]  # [B, 2, 6W] each
        head = conditioning.head[1:, rows].swapaxes(0, 1)  # [B, 1, 2W]
        return self._run(weights, x, blocks, head, 0, cache)

    def step(self, weights, conditioning, rows, codes, position, cache):
        """Reads one code per sequence, at `position` of the transformer; returns the logits of the next.

        Args:
          conditioning: at this position alone (no C axis).
          rows: which of the conditioning's classes each sequence has.
        """
        x = self.call(weights, "embed_code", codes, position)
        blocks = [modulation[rows][:, None] for modulation in conditioning.blocks]  # [B, 1, 6W] each
        return self._run(weights, x, blocks, conditioning.head[rows][:, None], position, cache)

    def _run(self, weights, x, blocks, head, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        inputs = [(modulation,) for modulation in blocks]
        x, cache = self.run_layers(block_of(self.model), weights, x, inputs, cache, position)
        return self.call(weights, "head", x[:, -1:], head)[:, 0], cache
