"""Generators: transformers over image codes, and what decoding needs of each of them."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.models.rar import PROJECTORS, RARTransformer

MODELS = {"rar": RARTransformer}


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


def build(config: ConfigDict, *, num_codes: int, embedding_dim: int) -> RARTransformer:
    """The generator that `config.model` and `config.method` describe.

    Args:
      config: the experiment.
      num_codes: N, codes per image of the tokenizer.
      embedding_dim: width of its codebook's vectors.

    Raises:
      RearError: sizes that do not fit together, or an unknown name.
    """
    model, method = config.model, config.method
    if model.name not in MODELS:
        raise RearError(f"config.model.name = {model.name!r}: use one of {', '.join(MODELS)}.")
    if model.width % model.heads:
        raise RearError(f"config.model.width = {model.width} is not divisible by config.model.heads = {model.heads}.")
    regularised = method.name == "rear" and method.embedding_weight > 0
    if regularised and method.projector not in PROJECTORS:
        raise RearError(f"config.method.projector = {method.projector!r}: use one of {', '.join(PROJECTORS)}.")
    for name in ("shallow_layer", "deep_layer"):
        if regularised and not 0 <= method[name] < model.depth:
            raise RearError(f"config.method.{name} = {method[name]} is not a layer of 0..{model.depth - 1}.")
    return MODELS[model.name](
        codebook_size=config.tokenizer.codebook_size,
        num_classes=config.data.num_classes,
        num_codes=num_codes,
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        mlp_width=model.mlp_width,
        dropout=model.dropout,
        projector=method.projector if regularised else "none",
        projector_width=method.projector_width,
        embedding_dim=embedding_dim,
        shallow_layer=method.shallow_layer,
        deep_layer=method.deep_layer,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        unroll=model.unroll,
    )
