"""How alike two images are, pixel by pixel: PSNR and SSIM."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from rear_jax.errors import RearError

WINDOW, SIGMA = 11, 1.5  # pixels: the Gaussian window of SSIM
K1, K2 = 0.01, 0.03
LEAST_ERROR = 1e-10  # of the mean square: equal images are at 100 dB


def psnr(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """−10 log₁₀ of the mean squared difference of images in [0, 1], in dB, at most 100."""
    squared = jnp.mean((a - b) ** 2, axis=(1, 2, 3), dtype=jnp.float32)
    return -10.0 * jnp.log10(jnp.maximum(squared, LEAST_ERROR))


def ssim(a: Float[Array, "B H W C"], b: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Structural similarity of images in [0, 1]: the mean over channels and over all windows within the image.

    SSIM = (2 μ_a μ_b + c₁)(2 σ_ab + c₂) / ((μ_a² + μ_b² + c₁)(σ_a² + σ_b² + c₂)), the moments weighted by an 11 × 11
    Gaussian of standard deviation 1.5, c₁ = 0.01², c₂ = 0.03². It is scikit-image's `structural_similarity` with
    `gaussian_weights=True, use_sample_covariance=False, data_range=1, channel_axis=-1`.

    Returns:
      [B] float32, at most 1.

    Raises RearError: the images are smaller than the window.

    References:
      Wang, Bovik, Sheikh & Simoncelli 2004, doi:10.1109/TIP.2003.819861.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise RearError(f"SSIM wants images of {WINDOW} pixels or more a side, these are {a.shape[1]}x{a.shape[2]}.")
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    mean_a, mean_b = _blur(a), _blur(b)
    variances = _blur(a * a) - mean_a**2 + _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    numerator = (2.0 * mean_a * mean_b + c1) * (2.0 * covariance + c2)
    return jnp.mean(numerator / ((mean_a**2 + mean_b**2 + c1) * (variances + c2)), axis=(1, 2, 3))


def _blur(images: jax.Array) -> jax.Array:
    """Gaussian means over every whole window: [B, H, W, C] -> [B, H − 10, W − 10, C]."""
    rows, columns = (_band(length) for length in images.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, images, columns, precision=lax.Precision.HIGHEST)


def _band(length: int) -> np.ndarray:
    """[length − 10, length]: the window's weights, one step further to the right in each row."""
    offsets = np.arange(length) - np.arange(length - WINDOW + 1)[:, None] - WINDOW // 2
    weights = np.exp(-0.5 * (offsets / SIGMA) ** 2) * (np.abs(offsets) <= WINDOW // 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
