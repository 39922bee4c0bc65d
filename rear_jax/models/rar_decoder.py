"""Cached decoding of the RAR-family transformer: the `models.Decoder` of `RARTransformer`.

The modulation of a block depends on (class, position) alone, not on the codes. So it is computed for whole segments
of positions at once, for each distinct class of the batch and for the null class, by a few large matrix products
before the segment's loop; the loop itself looks rows up. Weights are cut into layers and cast once, outside the loop.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.models.attention import KeyValues
from rear_jax.models.cached import Weights, append_null_label, cut_layers, grow_layers, new_layers
from rear_jax.models.rar import RARTransformer, block_of


class Conditioning(NamedTuple):
    """Modulation at C positions for R classes.

    Attributes:
      blocks: [C, L, R, 6W].
      head: [C, R, 2W].
    """

    blocks: jax.Array
    head: jax.Array


@dataclasses.dataclass(frozen=True)
class RARDecoder:
    """See `models.Decoder`; every method is pure."""

    model: RARTransformer

    @property
    def num_codes(self) -> int:
        return self.model.num_codes

    @property
    def prefix_length(self) -> int:
        return 2

    def prepare(self, params: Any) -> Weights:
        """Cuts the stacked blocks into layers and casts matrices to the compute dtype."""
        return cut_layers(params, self.model.depth, self.model.dtype)

    def guides(self, scale: float) -> bool:
        """RAR interpolates with any scale; 0 and 1 both mean the conditional model alone."""
        return scale not in (0.0, 1.0)

    def with_unconditional(
        self, weights: Weights, labels: Int[Array, " R"], rows: Int[Array, " B"]
    ) -> tuple[Int[Array, " R+1"], Int[Array, " 2B"]]:
        """The null label, once, for the second half of the batch."""
        return append_null_label(labels, rows, self.model.num_classes)

    def condition(self, weights: Weights, labels: Int[Array, " R"], positions: Int[Array, " C"]) -> Conditioning:
        """Modulation of every layer and of the head at the given positions, C leading."""
        conditions = self._rest(weights, "conditions", labels, positions).swapaxes(0, 1)  # [C, R, W]
        block = block_of(self.model)
        blocks = [block.apply({"params": layer}, conditions, method="modulation") for layer in weights.layers]
        return Conditioning(jnp.stack(blocks, axis=1), self._rest(weights, "head_modulation", conditions))

    def new_cache(self, batch: int, length: int) -> list[KeyValues]:
        """One empty past per layer."""
        return new_layers(self.model, batch, length)

    def grow_cache(self, cache: list[KeyValues], length: int) -> list[KeyValues]:
        """The same past with room for `length` positions."""
        return grow_layers(cache, length)

    def prefill(
        self,
        weights: Weights,
        labels: Int[Array, " R"],
        rows: Int[Array, " B"],
        cache: list[KeyValues],
    ) -> tuple[Float[Array, "B K"], list[KeyValues]]:
        """Reads cls and class; returns the logits of the first code."""
        conditioning = self.condition(weights, labels, jnp.arange(2))
        x = self._rest(weights, "embed_prefix", labels)[rows]
        blocks = conditioning.blocks[:, :, rows].transpose(1, 2, 0, 3)  # [L, B, 2, 6W]
        head = conditioning.head[1:, rows].swapaxes(0, 1)  # [B, 1, 2W]
        return self._run(weights, x, blocks, head, 0, cache)

    def step(
        self,
        weights: Weights,
        conditioning: Conditioning,
        rows: Int[Array, " B"],
        codes: Int[Array, " B"],
        position: Int[Array, ""],
        cache: list[KeyValues],
    ) -> tuple[Float[Array, "B K"], list[KeyValues]]:
        """Reads one code per sequence, at `position` of the transformer; returns the logits of the next.

        Args:
          conditioning: at this position alone (no C axis).
          rows: which of the conditioning's classes each sequence has.
        """
        x = self._rest(weights, "embed_code", codes, position)
        blocks = conditioning.blocks[:, rows][:, :, None]  # [L, B, 1, 6W]
        return self._run(weights, x, blocks, conditioning.head[rows][:, None], position, cache)

    def _run(self, weights, x, blocks, head, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        block, new_cache = block_of(self.model), []
        for layer, modulation, past in zip(weights.layers, blocks, cache, strict=True):
            x, past = block.apply({"params": layer}, x, modulation, past, position, method="step")
            new_cache.append(past)
        return self._rest(weights, "head", x[:, -1:], head)[:, 0], new_cache

    def _rest(self, weights: Weights, method: str, *arguments):
        """Calls a method of the model that needs no block."""
        return self.model.apply({"params": weights.rest}, *arguments, method=method)
