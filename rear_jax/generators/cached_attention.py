"""Attention over an explicit cache of keys and values, for decoding.

A step of decoding has few queries and a long past, so it waits for memory. How the cache lies there is the hardware's
matter. On a TPU the last axis is filled up to 128 features, and a product of one query with its head's keys does not
reach the matrix units. So the heads lie there side by side, and all of them are multiplied at once: each query has
zeros in the place of the other heads. What that adds to the arithmetic costs no time. Elsewhere the heads lie apart.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rear_jax.generators.attention import causal_mask, product
from rear_jax.generators.heads import Preparation
from rear_jax.generators.heads_together import prepared_together
from rear_jax.runtime.precision import platform
from rear_jax.runtime.sharding import BATCH_AXES, HEAD_AXES, constrain, devices_along


class KeyValues(NamedTuple):
    """The past of one attention layer: rows that have not been written yet are zero and masked.

    The heads lie in G groups, side by side in each: C = H·D / G features together.

    Attributes:
      keys: [B, G, S, C].
      values: [B, G, S, C].
    """

    keys: jax.Array
    values: jax.Array


def groups_of(heads: int) -> int:
    """How many groups the heads lie in: on a TPU one for each device that has heads of its own, else one a head."""
    devices = devices_along(HEAD_AXES)
    return devices if platform() == "tpu" and heads % devices == 0 else heads


def new_key_values(batch: int, heads: int, length: int, head_size: int, dtype: Any) -> KeyValues:
    """An empty cache with room for `length` positions."""
    groups = groups_of(heads)
    empty = _by_rows(jnp.zeros((batch, groups, length, heads * head_size // groups), dtype))
    return KeyValues(empty, empty)


def grow_key_values(past: KeyValues, length: int) -> KeyValues:
    """The same past with room for `length` positions, at least as many as it has."""
    more = length - past.keys.shape[2]
    return KeyValues(*(_by_rows(jnp.pad(a, ((0, 0), (0, 0), (0, more), (0, 0)))) for a in past))


def attend_to_past(
    qkv: Float[Array, "B T 3 H D"],
    preparation: Preparation,
    past: KeyValues,
    position: Int[Array, ""] | int,
    visible: Bool[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B T H*D"], KeyValues]:
    """Attention of T new positions, from `position` on, over the past and themselves.

    Args:
      qkv: queries, keys and values of the new positions.
      preparation: of queries and keys.
      past: S positions, the new ones among them.
      position: of the first query.
      visible: positions that others may see; each sees itself in any case. None = all.

    Returns:
      (what the values make, the past with the new positions).
    """
    heads, size = qkv.shape[3:]
    together = heads // past.keys.shape[1]
    queries, *new = preparation.apply(qkv) if together == 1 else prepared_together(qkv, preparation)
    past = KeyValues(*(_write(old, rows, position) for old, rows in zip(past, new, strict=True)))
    allowed = causal_mask(position + jnp.arange(qkv.shape[1]), past.keys.shape[2], visible)  # [T, S] or [B, 1, T, S]
    queries = _in_groups(queries, past.keys)
    if together > 1:
        own = jnp.repeat(jnp.eye(together, dtype=queries.dtype), size, axis=1)  # [R, C]: 1 at each head's features
        queries = (queries[:, :, :, None] * own).reshape(*queries.shape[:2], -1, queries.shape[3])  # [B, G, T·R, C]
        allowed = jnp.repeat(allowed, together, axis=-2)
    scores = product("bgrc,bgsc->bgrs", queries, past.keys, jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), axis=-1).astype(past.values.dtype)
    mixed = product("bgrs,bgsc->bgrc", weights, past.values, past.values.dtype)
    if together > 1:
        mixed = (mixed.reshape(*mixed.shape[:2], -1, *own.shape) * own).sum(axis=3)  # the others are not its own
    return mixed.swapaxes(1, 2).reshape(*qkv.shape[:2], -1), past


def _by_rows(cache: Float[Array, "B G S C"]) -> Float[Array, "B G S C"]:
    """The same, each device with rows of its own: with fsdp the compiler may give all rows to all devices."""
    return constrain(cache, BATCH_AXES, None, None, None)


def _in_groups(x: Float[Array, "B T ..."], cache: Float[Array, "B G S C"]) -> Float[Array, "B G T C"]:
    """Heads as a cache has them."""
    return x.reshape(*x.shape[:2], cache.shape[1], cache.shape[3]).swapaxes(1, 2)


def _write(
    old: Float[Array, "B G S C"], new: Float[Array, "B T ..."], position: Int[Array, ""] | int
) -> Float[Array, "B G S C"]:
    """A cache with T new positions from `position` on."""
    return _by_rows(jax.lax.dynamic_update_slice(old, _in_groups(new, old).astype(old.dtype), (0, 0, position, 0)))
