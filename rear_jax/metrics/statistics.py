"""Mean and covariance of features seen batch by batch, and the Fréchet distance between two such Gaussians."""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dpstrf

from rear_jax.errors import RearError


class Gaussian(NamedTuple):
    """Moments of a set of features, float64: `mean` [D] and unbiased `covariance` [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class GaussianStatistics:
    """First and second moments of the features so far; every method returns a new value.

    Batches are joined by the pairwise update of Chan, Golub & LeVeque (1979), which subtracts means before squaring,
    so that a large mean costs no digits.

    Attributes:
      count: n, the number of feature vectors.
      mean: [D] float64.
      scatter: [D, D] float64, Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, dim: int) -> "GaussianStatistics":
        """The statistics of no feature vectors of width `dim`."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def update(self, features: np.ndarray) -> "GaussianStatistics":
        """Adds a batch of features [n, D] of any float dtype; n may be 0.

        Raises RearError: the features are not [n, D] of the same D, or contain NaN or infinity.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise RearError(
                f"Features {features.shape} do not fit statistics of width {self.mean.size}: use one network."
            )
        require_features(features)
        if not len(features):
            return self
        mean = features.mean(axis=0)
        centred = features - mean
        return self.merge(GaussianStatistics(len(features), mean, centred.T @ centred))

    def merge(self, other: "GaussianStatistics") -> "GaussianStatistics":
        """The statistics of both sets together.

        Raises RearError: the feature widths differ.
        """
        if other.mean.size != self.mean.size:
            raise RearError(f"Cannot merge moments of widths {self.mean.size} and {other.mean.size}; use one network.")
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return GaussianStatistics(count, mean, self.scatter + other.scatter + between)

    def finish(self) -> Gaussian:
        """The mean and the covariance with divisor n − 1, as `np.cov` and the published FID code have it.

        Raises RearError: fewer than two feature vectors were seen.
        """
        if self.count < 2:
            raise RearError(f"A covariance needs at least 2 images, got {self.count}; evaluate on more.")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def require_features(*sets: np.ndarray) -> None:
    """Raises RearError where sets of features are not [n, D] of one D, or contain NaN or infinity."""
    if sets[0].ndim != 2 or len({features.shape[1:] for features in sets}) > 1:
        shapes = " and ".join(str(features.shape) for features in sets)
        raise RearError(f"Features {shapes} do not compare; use one network for both.")
    if not all(np.isfinite(features).all() for features in sets):
        raise RearError("Features contain NaN or infinity; look for broken images.")


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet (Wasserstein-2) distance between two Gaussians; FID when the features are Inception's.

    d² = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½. With factors Σ = F Fᵀ of as many columns as Σ has ranks
    the last trace is the sum of the singular values of F_aᵀ F_b: always real, exact for singular covariances, and
    without the loss of half the digits that a square root of a near-zero eigenvalue brings.

    Args:
      a: moments of width D.
      b: moments of the same width.

    Returns:
      The squared distance, in squared feature units, at least 0.

    Raises RearError: the widths differ, or a moment is not finite.

    References:
      Dowson & Landau 1982, doi:10.1016/0047-259X(82)90077-X; Heusel et al. 2017, arXiv:1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise RearError(f"Moments of widths {a.mean.size} and {b.mean.size} do not compare; use one network for both.")
    if not all(np.isfinite(moment).all() for moment in (*a, *b)):
        raise RearError("Statistics contain NaN or infinity; compute them again from finite features.")
    offset = a.mean - b.mean
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    squared = offset @ offset + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * overlap
    return max(float(squared), 0.0)


def frechet_distance_of(a: np.ndarray, b: np.ndarray) -> float:
    """`frechet_distance` of two sets of features [n, D] and [m, D]; quick where n and m are less than D.

    Features without their mean, over √(n − 1), are a factor F of the covariance too, with n columns and not D.

    Raises RearError: the widths differ, a set has fewer than two features, or a feature is not finite.
    """
    if a.ndim != 2 or a.shape[1:] != b.shape[1:]:
        raise RearError(f"Features of shapes {a.shape} and {b.shape} do not compare; use one network for both.")
    if max(len(a), len(b)) >= a.shape[1] or min(len(a), len(b)) < 2:
        moments = (GaussianStatistics.empty(a.shape[1]).update(features).finish() for features in (a, b))
        return frechet_distance(*moments)
    a, b = (np.asarray(features, np.float64) for features in (a, b))
    require_features(a)
    require_features(b)
    factors = [(features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (a, b)]
    offset = a.mean(axis=0) - b.mean(axis=0)
    overlap = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    return max(float(offset @ offset + sum(np.sum(f**2) for f in factors) - 2.0 * overlap), 0.0)


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F [D, r] with F Fᵀ = covariance of rank r: Cholesky with pivots, which ends where only rounding is left."""
    lower, pivots, rank, _ = dpstrf(np.asarray(covariance, np.float64), lower=1)
    factor = np.empty((len(lower), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
