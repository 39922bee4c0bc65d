"""Generators: transformers over image codes, and what decoding needs of each of them."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int


class Decoder(Protocol):
    """A generator as `decode.generate` sees it. All methods are pure; the cache is passed in and out.

    The transformer reads `prefix_length` positions that hold no codes, then code n at position prefix_length + n.
    """

    num_codes: int  # N, codes in a sequence
    null_label: int  # the label that stands for "no class"
    prefix_length: int

    def prepare(self, params: Any) -> Any:
        """Parameters in the form that the other methods take as `weights`, computed once per program."""

    def condition(self, weights: Any, labels: Int[Array, " R"], positions: Int[Array, " C"]) -> Any:
        """Whatever depends on (label, position) but on no code: a tree of arrays with the C axis leading."""

    def new_cache(self, batch: int, length: int) -> Any:
        """An empty cache with room for `length` positions."""

    def grow_cache(self, cache: Any, length: int) -> Any:
        """The same cache with room for `length` positions."""

    def prefill(
        self, weights: Any, labels: Int[Array, " R"], rows: Int[Array, " B"], cache: Any
    ) -> tuple[Float[Array, "B K"], Any]:
        """Reads the prefix of each sequence, whose label is `labels[rows]`; returns the logits of code 0."""

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
