"""Cached decoding of AliTok's transformer: the `models.Decoder` of `AliTokTransformer`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.models.alitok import AliTokTransformer, block_of
from rear_jax.models.attention import KeyValues
from rear_jax.models.cached import Weights, append_null_label, cut_layers, grow_layers, new_layers
from rear_jax.models.rotary import Rotation


@dataclasses.dataclass(frozen=True)
class AliTokDecoder:
    """See `models.Decoder`; every method is pure. Prefix tokens are codes like any other here."""

    model: AliTokTransformer

    @property
    def num_codes(self) -> int:
        return self.model.num_codes

    @property
    def prefix_length(self) -> int:
        return 1

    def prepare(self, params: Any) -> Weights:
        """Cuts the stacked blocks into layers and casts them to the compute dtype."""
        return cut_layers(params, self.model.depth, self.model.dtype)

    def guides(self, scale: float) -> bool:
        """As in the RAR family, any scale interpolates; 0 and 1 both mean the conditional model alone."""
        return scale not in (0.0, 1.0)

    def with_unconditional(
        self, weights: Weights, labels: Int[Array, " R"], rows: Int[Array, " B"]
    ) -> tuple[Int[Array, " R+1"], Int[Array, " 2B"]]:
        """The null label, once, for the second half of the batch."""
        return append_null_label(labels, rows, self.model.num_classes)

    def condition(self, weights: Weights, labels: Int[Array, " R"], positions: Int[Array, " C"]) -> Rotation:
        """Rotary embeddings of the positions; the class itself has its say in the cache."""
        return self.model.rotations.at(positions)

    def new_cache(self, batch: int, length: int) -> list[KeyValues]:
        """One empty past per layer."""
        return new_layers(self.model, batch, length)

    def grow_cache(self, cache: list[KeyValues], length: int) -> list[KeyValues]:
        """The same past with room for `length` positions."""
        return grow_layers(cache, length)

    def prefill(
        self, weights: Weights, labels: Int[Array, " R"], rows: Int[Array, " B"], cache: list[KeyValues]
    ) -> tuple[Float[Array, "B K"], list[KeyValues]]:
        """Reads the class; returns the logits of the first code."""
        x = self._rest(weights, "embed_prefix", labels)[rows]
        return self._run(weights, x, self.condition(weights, labels, jnp.arange(1)), 0, cache)

    def step(
        self,
        weights: Weights,
        conditioning: Rotation,
        rows: Int[Array, " B"],
        codes: Int[Array, " B"],
        position: Int[Array, ""],
        cache: list[KeyValues],
    ) -> tuple[Float[Array, "B K"], list[KeyValues]]:
        """Reads one code per sequence, at `position` of the transformer; returns the logits of the next.

        Args:
          conditioning: rotation at this position alone, [H/2].
          rows: not needed; the classes are in the cache.
        """
        x = self._rest(weights, "embed_code", codes, position)
        return self._run(weights, x, conditioning.at(None), position, cache)

    def _run(self, weights, x, rotation, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        block, new_cache = block_of(self.model), []
        for layer, past in zip(weights.layers, cache, strict=True):
            x, past = block.apply({"params": layer}, x, rotation, None, past, position, method="step")
            new_cache.append(past)
        return self._rest(weights, "head", x[:, -1:])[:, 0], new_cache

    def _rest(self, weights: Weights, method: str, *arguments):
        """Calls a method of the model that needs no block."""
        return self.model.apply({"params": weights.rest}, *arguments, method=method)
