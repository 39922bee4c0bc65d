"""Causal attention for training, and attention over an explicit cache of keys and values for decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rear_jax.generators.attention_kernels import LIBRARY, OURS, Task, choose
from rear_jax.generators.dropout import Dropout, drop_weights
from rear_jax.generators.heads import Preparation
from rear_jax.runtime.precision import factors, of_products
from rear_jax.runtime.sharding import BATCH_AXES, constrain


class KeyValues(NamedTuple):
    """The past of one attention layer: rows that have not been written yet are zero and masked.

    Attributes:
      keys: [B, H, T, D].
      values: [B, H, T, D].
    """

    keys: jax.Array
    values: jax.Array


def _by_rows(cache: Float[Array, "B H S D"]) -> Float[Array, "B H S D"]:
    """The same, each device with rows of its own: with fsdp the compiler may give all rows to all devices."""
    return constrain(cache, BATCH_AXES, None, None, None)


def new_key_values(batch: int, heads: int, length: int, head_size: int, dtype: Any) -> KeyValues:
    """An empty cache with room for `length` positions."""
    empty = _by_rows(jnp.zeros((batch, heads, length, head_size), dtype))
    return KeyValues(empty, empty)


def grow_key_values(past: KeyValues, length: int) -> KeyValues:
    """The same past with room for `length` positions, at least as many as it has."""
    more = length - past.keys.shape[2]
    return KeyValues(*(_by_rows(jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0)))) for a in past))


def update_key_values(
    past: KeyValues, keys: Float[Array, "B T H D"], values: Float[Array, "B T H D"], position: Int[Array, ""] | int
) -> KeyValues:
    """Writes T new positions from `position` on."""

    def write(old, new):
        return _by_rows(jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, position, 0)))

    return KeyValues(write(past.keys, keys), write(past.values, values))


def attend(
    queries: Float[Array, "B T H D"],
    past: KeyValues,
    position: Int[Array, ""] | int,
    visible: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T W"]:
    """Attention of T queries at `position`, `position` + 1, ... over the past, themselves included, heads side by side.

    Args:
      queries: of the new positions.
      past: S positions, in which the new ones have been written already.
      position: of the first query.
      visible: positions that others may see; each sees itself in any case. None = all.
    """
    scores = _product("bthd,bhsd->bhts", queries, past.keys, jnp.float32)
    scores = scores * queries.shape[-1] ** -0.5
    query_positions = position + jnp.arange(queries.shape[1])
    allowed = _causal_mask(query_positions, past.keys.shape[2], visible)
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
    mixed = _product("bhts,bhsd->bthd", weights.astype(past.values.dtype), past.values, past.values.dtype)
    return mixed.reshape(*mixed.shape[:2], -1)


def self_attention(
    qkv: Float[Array, "B T 3 H D"],
    preparation: Preparation,
    *,
    kernel: str = "auto",
    visible: Bool[Array, "B T"] | None = None,
    rate: float = 0.0,
    dropout: Dropout | None = None,
) -> Float[Array, "B T W"]:
    """Softmax attention of whole sequences under a causal mask, all heads side by side; softmax in float32.

    Args:
      qkv: queries, keys and values, in the compute dtype.
      preparation: of queries and keys.
      kernel: one of `attention_kernels.KERNELS`; 'plain' is what is written out here.
      visible: positions that others may see; each sees itself in any case. None = all.
      rate: share of attention weights set to zero (the rest scaled up), where there is `dropout`.
      dropout: where the mask is drawn; None switches dropout off.

    Raises RearError: the kernel that is named cannot compute this here.
    """
    rate, dropout = (rate, dropout) if rate and dropout is not None else (0.0, None)
    kernel = choose(kernel, Task.of(qkv, rate=rate, masked=visible is not None))
    if kernel in OURS:
        return OURS[kernel](qkv, preparation, visible, rate, dropout)
    queries, keys, values = preparation.apply(qkv)
    batch, length, *_ = queries.shape
    if kernel in LIBRARY:
        return LIBRARY[kernel](queries, keys, values).reshape(batch, length, -1)
    scores = _product("bthd,bshd->bhts", queries, keys, jnp.float32)
    allowed = _causal_mask(jnp.arange(length), length, visible)
    scores = jnp.where(allowed, scores * queries.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if dropout is not None:
        weights = drop_weights(weights, rate, dropout)
    return _product("bhts,bshd->bthd", weights, values, values.dtype).reshape(batch, length, -1)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """An einsum with a result in `dtype`."""
    return jnp.einsum(axes, *factors(a, b, dtype), precision=of_products(), preferred_element_type=dtype)


def _causal_mask(
    query_positions: Int[Array, " T"], length: int, visible: Bool[Array, "B S"] | None
) -> Bool[Array, "T S"] | Bool[Array, "B 1 T S"]:
    """Which of `length` positions each query sees: itself, and the visible ones before it."""
    positions = jnp.arange(length)
    causal = positions <= query_positions[:, None]
    if visible is None:
        return causal
    return causal & visible[:, None, None, :] | (positions == query_positions[:, None])
