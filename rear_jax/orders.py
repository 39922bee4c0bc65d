"""Random generation orders with annealing (RAR, arXiv 2411.00776). Nothing here but jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray


def random_share(progress: Float[Array, ""] | float, *, start: float, end: float) -> Float[Array, ""]:
    """Share of sequences in random order: 1 up to `start`, then linearly down to 0 at `end`.

    Args:
      progress: step / total steps, in [0, 1].
      start: of the annealing; RAR's is 0.5 (epoch 200 of 400).
      end: of the annealing; RAR's is 0.75. Equal to `start`, the share drops at once.
    """
    progress = jnp.asarray(progress, jnp.float32)
    if end <= start:
        return jnp.where(progress < start, 1.0, 0.0)
    return jnp.clip((end - progress) / (end - start), 0.0, 1.0)


def draw_orders(
    key: PRNGKeyArray, batch: int, num_codes: int, share: Float[Array, ""] | float
) -> Int[Array, "batch num_codes"]:
    """For each sequence a uniform permutation with probability `share`, else raster order.

    Returns:
      orders[b, n] = raster position of the n-th code that sequence b generates.
    """
    share_key, order_key = jax.random.split(key)
    raster = jnp.broadcast_to(jnp.arange(num_codes), (batch, num_codes))
    shuffled = jax.random.permutation(order_key, raster, axis=1, independent=True)
    return jnp.where(jax.random.bernoulli(share_key, share, (batch, 1)), shuffled, raster)


def reorder(codes: Int[Array, "B N"], orders: Int[Array, "B N"]) -> Int[Array, "B N"]:
    """Codes in raster order -> codes in the order of generation."""
    return jnp.take_along_axis(codes, orders, axis=1)
