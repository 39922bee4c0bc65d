"""Causal attention for training, and attention over an explicit cache of keys and values for decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class KeyValues(NamedTuple):
    """The past of one attention layer: rows that have not been written yet are zero and masked.

    Attributes:
      keys: [B, H, T, D].
      values: [B, H, T, D].
    """

    keys: jax.Array
    values: jax.Array


def new_key_values(batch: int, heads: int, length: int, head_size: int, dtype: Any) -> KeyValues:
    """An empty cache with room for `length` positions."""
    empty = jnp.zeros((batch, heads, length, head_size), dtype)
    return KeyValues(empty, empty)


def grow_key_values(past: KeyValues, length: int) -> KeyValues:
    """The same past with room for `length` positions, at least as many as it has."""
    more = length - past.keys.shape[2]
    return KeyValues(*(jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0))) for a in past))


def update_key_values(
    past: KeyValues, keys: Float[Array, "B T H D"], values: Float[Array, "B T H D"], position: Int[Array, ""] | int
) -> KeyValues:
    """Writes T new positions from `position` on."""

    def write(old, new):
        return jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, position, 0))

    return KeyValues(write(past.keys, keys), write(past.values, values))


def attend(
    queries: Float[Array, "B T H D"], past: KeyValues, position: Int[Array, ""] | int
) -> Float[Array, "B T H D"]:
    """Attention of T queries at `position`, `position` + 1, ... over the past, themselves included."""
    scores = jnp.einsum("bthd,bhsd->bhts", queries, past.keys, preferred_element_type=jnp.float32)
    scores = scores * queries.shape[-1] ** -0.5
    query_positions = position + jnp.arange(queries.shape[1])
    visible = jnp.arange(past.keys.shape[2]) <= query_positions[:, None]  # [T, S]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bhsd->bthd", weights.astype(past.values.dtype), past.values)


def causal_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T H D"],
    values: Float[Array, "B T H D"],
    *,
    dropout: float = 0.0,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention under a causal mask; softmax in float32.

    Args:
      queries, keys, values: one compute dtype.
      dropout: share of attention weights set to zero (the rest scaled up), where `key` is given.
      key: random key of the dropout mask; None switches dropout off.
    """
    length = queries.shape[1]
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(visible, scores * queries.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if key is not None and dropout:
        weights = apply_dropout(key, weights, dropout)
    return jnp.einsum("bhts,bshd->bthd", weights, values)


def apply_dropout(key: PRNGKeyArray, x: Float[Array, "..."], rate: float) -> Float[Array, "..."]:
    """Inverted dropout. Sixteen random bits an element: `rate` is met to 1 / 65 536 at half the cost of a uniform."""
    kept = jax.random.bits(key, x.shape, jnp.uint16) >= round(rate * 65536)
    return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)
