"""What the cached forms of all generators share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from rear_jax.models.attention import KeyValues, grow_key_values, new_key_values


class Weights(NamedTuple):
    """Parameters as decoding reads them: one tree per layer, and everything outside the blocks."""

    layers: list[Any]
    rest: Any


def cut_layers(params: Any, depth: int, dtype: Any) -> Weights:
    """Cuts the stacked blocks `params['blocks']` into layers and casts them to the compute dtype."""
    cast = jax.tree.map(lambda p: p.astype(dtype), params["blocks"])
    layers = [jax.tree.map(lambda p, i=i: p[i], cast) for i in range(depth)]
    rest = {name: value for name, value in params.items() if name != "blocks"}
    return Weights(layers, rest)


def append_null_label(
    labels: Int[Array, " R"], rows: Int[Array, " B"], null_label: int
) -> tuple[Int[Array, " R+1"], Int[Array, " 2B"]]:
    """Labels and rows of both halves of a guided batch: the second half has the null label."""
    rows = jnp.concatenate([rows, jnp.full_like(rows, labels.shape[0])])
    return jnp.append(labels, null_label), rows


def new_layers(model: Any, batch: int, length: int) -> list[KeyValues]:
    """One empty past per layer of a generator, with room for `length` positions."""
    return [
        new_key_values(batch, model.heads, length, model.width // model.heads, model.dtype) for _ in range(model.depth)
    ]


def grow_layers(layers: list[KeyValues], length: int) -> list[KeyValues]:
    """The same pasts with room for `length` positions."""
    return [grow_key_values(past, length) for past in layers]
