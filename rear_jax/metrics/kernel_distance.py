"""The kernel distance (KID): the maximum mean discrepancy between two sets of features under a cubic kernel."""

import numpy as np

from rear_jax.errors import RearError
from rear_jax.metrics.statistics import require_features

SUBSETS, SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults
SEED = 2020  # ... and its random numbers, so that the same features give the same number


def kernel_distance(
    generated: np.ndarray, real: np.ndarray, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> float:
    """The unbiased estimate of MMD² with the kernel k(x, y) = (x·y / D + 1)³, averaged over random subsets.

    Unlike the Fréchet distance it has no bias from the number of images; it can lie slightly below 0.

    Args:
      generated: features [n, D].
      real: features [m, D].
      subsets: how many pairs of subsets are drawn.
      subset_size: images in each, drawn without replacement.

    Returns:
      The mean over the subsets, in float64.

    Raises RearError: a set is smaller than a subset, the widths differ, or a feature is not finite.

    References:
      Bińkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401.
    """
    require_features(generated, real)
    if not 2 <= subset_size <= min(len(generated), len(real)):
        raise RearError(
            f"KID on subsets of {subset_size} images cannot be had from {len(generated)} and {len(real)}: "
            "evaluate more, or set config.evaluate.kid_subset_size to at least 2 and at most that, or to 0 for no KID."
        )
    random, found = np.random.RandomState(SEED), []
    for _ in range(subsets):
        x, y = (
            features[random.choice(len(features), subset_size, replace=False)].astype(np.float64)
            for features in (generated, real)
        )
        found.append(_off_diagonal_mean(_kernel(x, x)) + _off_diagonal_mean(_kernel(y, y)) - 2 * _kernel(x, y).mean())
    return float(np.mean(found))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base


def _off_diagonal_mean(kernel: np.ndarray) -> float:
    n = len(kernel)
    return (kernel.sum() - np.trace(kernel)) / (n * (n - 1))
