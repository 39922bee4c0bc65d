"""What CLIP and HPSv2 do with an image before their network sees it. They do not do the same.

CLIP (arXiv:2103.00020) resizes 8-bit images, so that the shorter side fits, cuts out the centre, and normalises. Its
resizing is Pillow's, which rounds to 8 bits after each of two passes. `clip_pixels` is that, on the host.

HPSv2 (arXiv:2306.09341) resizes floats, so that the longer side fits, without clipping what overshoots, and pads with
black before it normalises. `hps_pixels` is that, a differentiable function for any device.

`clip_pixels_of_floats` is the same for CLIP. It is exact where the shorter side has the right size already. Otherwise
it lacks the rounding to 8 bits, and differs from `clip_pixels` by about one level of 255.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from rear_jax.runtime.precision import PRECISIONS

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the colours, in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
PILLOW, PYTORCH = -0.5, -0.75  # the free parameter of cubic convolution (Keys 1981)


def clip_pixels(images: UInt8[np.ndarray, "B H W 3"], size: int) -> Float[np.ndarray, "B S S 3"]:
    """CLIP's preprocessing of 8-bit images, S = `size` pixels a side."""
    height, width = shorter_side(images.shape[1:3], size)
    resized = images
    if (height, width) != images.shape[1:3]:
        pictures = (Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in images)
        resized = np.stack([np.asarray(picture) for picture in pictures])
    top, left = centre((height, width), size)
    cut = resized[:, top : top + size, left : left + size]
    return np.asarray((cut / np.float32(255) - np.float32(MEAN)) / np.float32(STD))


def clip_pixels_of_floats(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B S S 3"]:
    """The same of floats in [0, 1], without rounding; what overshoots in a pass of resizing is clipped, as there."""
    height, width = shorter_side(images.shape[1:3], size)
    x = images.astype(jnp.float32)
    for axis, length in ((2, width), (1, height)):
        if length != x.shape[axis]:
            x = jnp.clip(resize(x, axis, length, antialias=True), 0.0, 1.0)
    top, left = centre((height, width), size)
    return normalise(x[:, top : top + size, left : left + size])


def hps_pixels(images: Float[Array, "B H W 3"], size: int, *, antialias: bool = True) -> Float[Array, "B S S 3"]:
    """HPSv2's preprocessing of floats in [0, 1], S = `size` pixels a side.

    Args:
      images: 8-bit images divided by 255, or images as a decoder gives them.
      size: S.
      antialias: as torchvision does it since version 0.17; before, it did not.
    """
    height, width = longer_side(images.shape[1:3], size)
    x = images.astype(jnp.float32)
    for axis, length in ((2, width), (1, height)):
        if length != x.shape[axis]:
            x = resize(x, axis, length, antialias=antialias)
    missing = size - height, size - width
    return normalise(jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in missing), (0, 0))))


def normalise(images: Float[Array, "B S S 3"]) -> Float[Array, "B S S 3"]:
    """(x − mean) / std of each colour."""
    return (images - jnp.array(MEAN, jnp.float32)) / jnp.array(STD, jnp.float32)


def shorter_side(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width such that the shorter one is `size`; the other one is rounded down."""
    return tuple(size if length == min(shape) else size * length // min(shape) for length in shape)


def longer_side(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width such that the longer one is `size`; the other one is rounded, halves to even."""
    scale = size / max(shape)
    return tuple(max(1, round(length * scale)) for length in shape)


def centre(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """Top and left of the window of `size` pixels a side in the middle; halves are rounded to even."""
    return tuple(round((length - size) / 2) for length in shape)


def resize(images: jax.Array, axis: int, length: int, *, antialias: bool) -> jax.Array:
    """Cubic resizing of one axis of [B, H, W, C] to a length, in float32, see `cubic_weights`."""
    weights = cubic_weights(images.shape[axis], length, antialias=antialias)
    resized = jnp.tensordot(images, weights, ((axis,), (1,)), precision=PRECISIONS[-1])
    return jnp.moveaxis(resized, -1, axis)


def cubic_weights(length: int, wanted: int, *, antialias: bool) -> Float[np.ndarray, "wanted length"]:
    """The share of each of `length` pixels in each of `wanted` ones; rows add up to 1.

    With antialiasing the cubic is Pillow's; it is as wide as a new pixel where this is wider than an old one, and cut
    off at the border. Without, it is PyTorch's, and beyond the border the pixel there is repeated.
    """
    step = length / wanted
    place = (np.arange(wanted) + 0.5) * step - 0.5  # of the new pixels among the old ones
    if antialias:
        weights = cubic((place[:, None] - np.arange(length)) / max(step, 1.0), PILLOW)
        return np.float32(weights / weights.sum(axis=1, keepdims=True))
    weights = np.zeros((wanted, length))
    first = np.floor(place).astype(int) - 1
    for neighbour in range(4):
        index = first + neighbour
        np.add.at(weights, (np.arange(wanted), index.clip(0, length - 1)), cubic(place - index, PYTORCH))
    return np.float32(weights)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The kernel of cubic convolution: a smooth bump from -2 to 2, 1 at 0 and 0 at ±1."""
    x = np.abs(x)
    inside = ((a + 2) * x - (a + 3)) * x * x + 1
    outside = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, inside, np.where(x < 2, outside, 0.0))
