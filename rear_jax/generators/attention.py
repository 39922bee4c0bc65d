"""Causal attention of whole sequences, for training."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rear_jax.generators.attention_kernels import LIBRARY, OURS, Task, choose
from rear_jax.generators.dropout import Dropout, drop_weights
from rear_jax.generators.heads import Preparation
from rear_jax.runtime.precision import factors, of_products


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
    scores = product("bthd,bshd->bhts", queries, keys, jnp.float32)
    allowed = causal_mask(jnp.arange(length), length, visible)
    scores = jnp.where(allowed, scores * queries.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    if dropout is not None:
        weights = drop_weights(weights, rate, dropout)
    return product("bhts,bshd->bthd", weights, values, values.dtype).reshape(batch, length, -1)


def product(axes: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """An einsum with a result in `dtype`."""
    return jnp.einsum(axes, *factors(a, b, dtype), precision=of_products(), preferred_element_type=dtype)


def causal_mask(
    query_positions: Int[Array, " T"], length: int, visible: Bool[Array, "B S"] | None
) -> Bool[Array, "T S"] | Bool[Array, "B 1 T S"]:
    """Which of `length` positions each query sees: itself, and the visible ones before it."""
    positions = jnp.arange(length)
    causal = positions <= query_positions[:, None]
    if visible is None:
        return causal
    return causal & visible[:, None, None, :] | (positions == query_positions[:, None])
