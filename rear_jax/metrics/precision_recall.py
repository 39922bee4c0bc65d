"""Improved precision and recall: how much of each of two sets lies in the other's estimated manifold."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rear_jax.errors import RearError
from rear_jax.metrics.statistics import require_features

BLOCK = 512  # rows of a distance matrix held at a time


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: `precision` of generated images that look real, `recall` of real images that are covered."""

    precision: float
    recall: float


def precision_recall(real: np.ndarray, generated: np.ndarray, neighbours: int = 3) -> PrecisionRecall:
    """Precision and recall with k-nearest-neighbour manifolds.

    The manifold of a set is the union of balls round its points, each reaching to the point's k-th nearest neighbour
    within the set. Precision is the share of generated features inside the real manifold, recall the share of real
    features inside the generated one. Distances are Euclidean, computed in float32 on features centred on the real
    mean, one block of rows at a time, so memory grows with the number of images and not with its square.

    Args:
      real: features [N, D].
      generated: features [M, D]; the published numbers have M = N.
      neighbours: k; 3 in the paper.

    Returns:
      `PrecisionRecall`.

    Raises RearError: a set has no more than k features, the widths differ, or a feature is not finite.

    References:
      Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models",
      arXiv:1904.06991.
    """
    require_features(real, generated)
    if min(len(real), len(generated)) <= neighbours:
        raise RearError(f"Precision and recall with k={neighbours} need more than {neighbours} images on each side.")
    centre = real.mean(axis=0, dtype=np.float64)
    real, generated = (jnp.asarray(_centred(features, centre)) for features in (real, generated))
    return PrecisionRecall(
        precision=_share_inside(generated, real, _squared_radii(real, neighbours)),
        recall=_share_inside(real, generated, _squared_radii(generated, neighbours)),
    )


def _centred(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Features [N, D] less a float64 centre [D], as float32; only a block at a time is there in float64."""
    centred = np.empty(features.shape, np.float32)
    for start in range(0, len(features), BLOCK):
        centred[start : start + BLOCK] = features[start : start + BLOCK] - centre
    return centred


def _squared_radii(points: jax.Array, neighbours: int) -> jax.Array:
    """Squared distance of every point [N, D] to its k-th nearest other point: [N]."""
    radii = [_block_radii(points[i : i + BLOCK], points, i, neighbours) for i in range(0, len(points), BLOCK)]
    return jnp.concatenate(radii)


def _share_inside(points: jax.Array, centres: jax.Array, squared_radii: jax.Array) -> float:
    """The share of points [M, D] that lie in a ball round one of centres [N, D]."""
    counts = [_block_inside(points[i : i + BLOCK], centres, squared_radii) for i in range(0, len(points), BLOCK)]
    return int(sum(counts)) / len(points)


@functools.partial(jax.jit, static_argnames="neighbours")
def _block_radii(rows: jax.Array, points: jax.Array, start: int, neighbours: int) -> jax.Array:
    own = start + jnp.arange(len(rows))
    distances = _squared_distances(rows, points).at[jnp.arange(len(rows)), own].set(jnp.inf)
    return kth_smallest(distances, neighbours)


def kth_smallest(values: jax.Array, k: int) -> jax.Array:
    """The k-th smallest of each row [n, N], equal ones counted apiece: [n].

    For a few neighbours k passes take a twentieth of the time of XLA's `top_k`, which sorts, on a CPU.
    """
    columns = jnp.arange(values.shape[1])
    for _ in range(k - 1):
        nearest = jnp.argmin(values, axis=1, keepdims=True)
        values = jnp.where(columns == nearest, jnp.inf, values)
    return values.min(axis=1)


@jax.jit
def _block_inside(rows: jax.Array, centres: jax.Array, squared_radii: jax.Array) -> jax.Array:
    return jnp.any(_squared_distances(rows, centres) <= squared_radii, axis=1).sum()


def _squared_distances(rows: jax.Array, points: jax.Array) -> jax.Array:
    """[n, D] × [N, D] -> [n, N] float32."""
    products = jnp.matmul(rows, points.T, precision=lax.Precision.HIGHEST)
    squares = jnp.sum(rows**2, axis=1)[:, None] + jnp.sum(points**2, axis=1)
    return jnp.maximum(squares - 2.0 * products, 0.0)
