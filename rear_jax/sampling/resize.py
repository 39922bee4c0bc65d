"""Bicubic resizing as PyTorch does it, for scores that the papers took of resized samples."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

STEEPNESS = -0.75  # PyTorch's choice of the kernel's free parameter


def bicubic(images: Float[Array, "B H W C"], size: int) -> Float[Array, "B size size C"]:
    """`torch.nn.functional.interpolate(mode='bicubic')`: no antialiasing, half-pixel centres, edges repeated.

    The cubic convolution of Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -0.75.
    """
    rows, columns = (jnp.asarray(_weights(length, size)) for length in images.shape[1:3])
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("yh,bhwc,xw->byxc", rows, images.astype(jnp.float32), columns, precision=exact)


def _weights(length: int, size: int) -> np.ndarray:
    """[size, length]: what each pixel of the input counts in each of the output."""
    centre = (np.arange(size) + 0.5) * length / size - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((size, length))
    for tap in range(-1, 3):
        distance = np.abs(centre - (first + tap))
        np.add.at(weights, (np.arange(size), np.clip(first + tap, 0, length - 1)), _kernel(distance))
    return weights.astype(np.float32)


def _kernel(distance: np.ndarray) -> np.ndarray:
    """Keys's kernel at distances in [0, 2]."""
    a, d = STEEPNESS, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, far)
