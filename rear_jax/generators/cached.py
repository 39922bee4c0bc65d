"""Generators as decoding sees them: `CachedGenerator`, and what the cached forms of all families share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.generators.cached_attention import KeyValues, grow_key_values, new_key_values


class Weights(NamedTuple):
    """Parameters as decoding reads them: one tree per layer, and everything outside the blocks."""

    layers: list[Any]
    rest: Any


@dataclasses.dataclass(frozen=True)
class CachedGenerator:
    """A generator as `sampling.generate` sees it. All methods are pure; the cache is passed in and out.

    The transformer reads `prefix_length` positions that hold no codes, then code n at position prefix_length + n. What
    `conditions` are is the generator's own: labels [R], or a tree of arrays that lead with R. What stands here suits a
    generator of labels whose parameters hold its stacked blocks as `blocks`; a family overrides what differs, and
    writes `prefill` and `step`.
    """

    model: Any

    @property
    def num_codes(self) -> int:
        """N, codes in a sequence."""
        return self.model.num_codes

    @property
    def prefix_length(self) -> int:
        """Positions before the codes."""
        return 1

    def prepare(self, params: Any) -> Any:
        """Parameters in the form that the other methods take as `weights`, computed once per program.

        The stacked blocks are cut into layers, and their kernels are cast to the compute dtype. Biases, scales and
        shifts stay float32, as training reads them.
        """
        of_kernels = 3  # dimensions: layer, in, out
        blocks = jax.tree.map(lambda p: p.astype(self.model.dtype) if p.ndim == of_kernels else p, params["blocks"])
        layers = [jax.tree.map(lambda p, i=i: p[i], blocks) for i in range(self.model.depth)]
        return Weights(layers, {name: value for name, value in params.items() if name != "blocks"})

    def guides(self, scale: float) -> bool:
        """Whether this guidance scale needs the unconditional model: 0 and 1 both mean the conditional one alone."""
        return scale not in (0.0, 1.0)

    def with_unconditional(
        self, weights: Any, conditions: Any, rows: Int[Array, " B"]
    ) -> tuple[Any, Int[Array, " 2B"]]:
        """Conditions and rows of a guided batch: B conditional sequences, then the same B without their condition."""
        rows = jnp.concatenate([rows, jnp.full_like(rows, conditions.shape[0])])
        return jnp.append(conditions, self.model.num_classes), rows

    def condition(self, weights: Any, conditions: Any, positions: Int[Array, " C"]) -> Any:
        """Whatever depends on (condition, position) but on no code: a tree of arrays with the C axis leading."""
        return None

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache with room for `length` positions: a tree of arrays that lead with the batch."""
        model = self.model
        sizes = batch, model.heads, length, model.width // model.heads, model.dtype
        return [new_key_values(*sizes) for _ in range(model.depth)]

    def grow_cache(self, cache: Any, length: int) -> Any:
        """The same cache with room for `length` positions."""
        return [grow_key_values(past, length) for past in cache]

    def prefill(
        self, weights: Any, conditions: Any, rows: Int[Array, " B"], cache: Any
    ) -> tuple[Float[Array, "B K"], Any]:
        """Reads the prefix of each sequence, whose condition is `conditions[rows]`; returns the logits of code 0."""
        raise NotImplementedError

    def step(
        self,
        weights: Any,
        conditioning: Any,
        rows: Int[Array, " B"],
        codes: Int[Array, " B"],
        position: Int[Array, ""],
        cache: Any,
    ) -> tuple[Float[Array, "B K"], Any]:
        """Reads one code per sequence at `position` (with `condition`'s entry for it); returns the next logits."""
        raise NotImplementedError

    def run_layers(
        self, block: Any, weights: Weights, x: jax.Array, inputs: list[tuple], cache: list[KeyValues], at: Any
    ):
        """Runs every layer's `block.step` on new positions from `at` on; `inputs` are what each reads besides x.

        Returns:
          (output [B, T, W] of the last layer, the new cache).
        """
        new_cache = []
        for layer, extra, past in zip(weights.layers, inputs, cache, strict=True):
            x, past = block.apply({"params": layer}, x, *extra, past, at, method="step")
            new_cache.append(past)
        return x, new_cache

    def call(self, weights: Weights, method: str, *arguments: Any) -> Any:
        """Calls a method of the model that needs no block."""
        return self.model.apply({"params": weights.rest}, *arguments, method=method)
