"""Cached decoding of LlamaGen's transformer: the `models.Decoder` of `LlamaGenTransformer`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.models.attention import KeyValues
from rear_jax.models.cached import Weights, append_null_label, cut_layers, grow_layers, new_layers
from rear_jax.models.llamagen import Captions, LlamaGenTransformer, block_of
from rear_jax.models.rotary import Rotation


class Cache(NamedTuple):
    """The past of a batch.

    Attributes:
      layers: keys and values of each.
      visible: [B, S] bool, False where a caption is padded; None without captions.
    """

    layers: list[KeyValues]
    visible: jax.Array | None


@dataclasses.dataclass(frozen=True)
class LlamaGenDecoder:
    """See `models.Decoder`; every method is pure. Conditions are labels [R], or `Captions` that lead with R."""

    model: LlamaGenTransformer

    @property
    def num_codes(self) -> int:
        return self.model.num_codes

    @property
    def prefix_length(self) -> int:
        return self.model.prefix_length

    def prepare(self, params: Any) -> Weights:
        """Cuts the stacked blocks into layers and casts them to the compute dtype."""
        return cut_layers(params, self.model.depth, self.model.dtype)

    def guides(self, scale: float) -> bool:
        """LlamaGen's scales up to 1 all mean the conditional model alone."""
        return scale > 1.0

    def with_unconditional(
        self, weights: Weights, conditions: Int[Array, " R"] | Captions, rows: Int[Array, " B"]
    ) -> tuple[Int[Array, " R+1"] | Captions, Int[Array, " 2B"]]:
        """The null label, once; or the null caption under the mask of each caption."""
        if self.model.condition == "class":
            return append_null_label(conditions, rows, self.model.num_classes)
        features, mask = conditions
        null = jnp.broadcast_to(weights.rest["null_caption"], features.shape)
        both = Captions(jnp.concatenate([features, null]), jnp.concatenate([mask, mask]))
        return both, jnp.concatenate([rows, rows + len(mask)])

    def condition(
        self, weights: Weights, conditions: Int[Array, " R"] | Captions, positions: Int[Array, " C"]
    ) -> Rotation:
        """Rotary embeddings of the positions; the condition itself has its say in the cache."""
        return self.model.rotations.at(positions)

    def new_cache(self, batch: int, length: int) -> Cache:
        """One empty past per layer, all of it visible."""
        layers = new_layers(self.model, batch, length)
        return Cache(layers, None if self.model.condition == "class" else jnp.ones((batch, length), bool))

    def grow_cache(self, cache: Cache, length: int) -> Cache:
        """The same past with room for `length` positions."""
        visible = cache.visible
        if visible is not None:
            visible = jnp.pad(visible, ((0, 0), (0, length - visible.shape[1])), constant_values=True)
        return Cache(grow_layers(cache.layers, length), visible)

    def prefill(
        self, weights: Weights, conditions: Int[Array, " R"] | Captions, rows: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Reads the condition; returns the logits of the first code."""
        x = self._rest(weights, "embed_conditions", conditions)[rows]
        visible = self.model.visible(conditions, cache.layers[0].keys.shape[2])
        cache = Cache(cache.layers, None if visible is None else visible[rows])
        rotation = self.condition(weights, conditions, jnp.arange(self.prefix_length))
        return self._run(weights, x, rotation, 0, cache)

    def step(
        self,
        weights: Weights,
        conditioning: Rotation,
        rows: Int[Array, " B"],
        codes: Int[Array, " B"],
        position: Int[Array, ""],
        cache: Cache,
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Reads one code per sequence, at `position` of the transformer; returns the logits of the next.

        Args:
          conditioning: rotation at this position alone, [H/2].
          rows: not needed; the conditions are in the cache.
        """
        x = self._rest(weights, "embed_code", codes)
        return self._run(weights, x, conditioning.at(None), position, cache)

    def _run(self, weights, x, rotation, position, cache):
        """Runs the blocks on new positions and the head on the last of them."""
        block, layers = block_of(self.model), []
        for layer, past in zip(weights.layers, cache.layers, strict=True):
            x, past = block.apply({"params": layer}, x, rotation, cache.visible, past, position, method="step")
            layers.append(past)
        return self._rest(weights, "head", x[:, -1:])[:, 0], Cache(layers, cache.visible)

    def _rest(self, weights: Weights, method: str, *arguments):
        """Calls a method of the model that needs no block."""
        return self.model.apply({"params": weights.rest}, *arguments, method=method)
