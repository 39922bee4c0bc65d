"""Crops and mirror images of uint8 pixels, with the resampling that published codes and reference statistics used.

Every function takes an array uint8 [H, W, 3] of any size and returns square crops of `size` pixels.
"""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

TEN_CROP_RANGE = 1.1  # short side of the image that ten crops are cut from, in units of the crop's side
WIDE_RANGE = 1.25  # the largest one of LlamaGen's tokenizer training


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The central square after resizing the short side to `size`.

    Args:
      image: uint8 [H, W, 3].
      size: side of the crop in pixels.

    Returns:
      uint8 [size, size, 3]; `image` itself where it already has that shape.

    Source: `center_crop_arr` of ADM (Dhariwal and Nichol, arXiv 2105.05233), as DiT, LlamaGen and RAR use it.
    """
    if image.shape[:2] == (size, size):
        return image
    resized = _resize_short_side(image, size)
    height, width, _ = resized.shape
    return _window(resized, (height - size) // 2, (width - size) // 2, size)


def bicubic_center_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """The central square after one bicubic step to a short side of `size`; `rng` is not asked.

    Unlike `center_crop` it makes no halvings first, and the long side is rounded down.

    Source: torchvision's Resize and CenterCrop, as VA-π's code for Janus-Pro has them (arXiv 2512.19680).
    """
    picture = Image.fromarray(image)
    target = [max(size, int(size * side / min(picture.size))) for side in picture.size]
    resized = np.asarray(picture.resize(target, resample=Image.Resampling.BICUBIC))
    return _five_crop(resized, size)[-1]


def ten_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Four corners and the centre of the 1.1 times larger central square, then the same five of its mirror image.

    Args:
      image: uint8 [H, W, 3].
      size: side of the crops in pixels.

    Returns:
      Ten arrays uint8 [size, size, 3]: top-left, top-right, bottom-left, bottom-right, centre; mirrored likewise.

    Source: LlamaGen's code extraction (`center_crop_arr` to int(1.1 * size), then torchvision's TenCrop), which
    RAR and reAR train on.
    """
    square = center_crop(image, int(size * TEN_CROP_RANGE))
    return _five_crop(square, size) + _five_crop(_mirror(square), size)


def random_crop_flip(
    image: np.ndarray, size: int, rng: np.random.Generator, *, largest: float = TEN_CROP_RANGE
) -> np.ndarray:
    """A random window of the image resized to a random short side in [size, largest·size], mirrored with probability ½.

    By default it is the continuous counterpart of `ten_crop`. It resamples even an image of the right size.

    Args:
      image: uint8 [H, W, 3].
      size: side of the crop in pixels.
      rng: source of the four draws (short side, top, left, mirroring).
      largest: 1.25 in LlamaGen's tokenizer training (`random_crop_arr`); 1 in TiTok's, whose window moves along the
        long side alone.

    Returns:
      uint8 [size, size, 3].
    """
    short_side = int(rng.integers(size, int(size * largest), endpoint=True))
    resized = _resize_short_side(image, short_side)
    height, width, _ = resized.shape
    top = int(rng.integers(0, height - size, endpoint=True))
    left = int(rng.integers(0, width - size, endpoint=True))
    return _maybe_mirror(_window(resized, top, left, size), rng)


def center_crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`center_crop`, mirrored with probability 1/2."""
    return _maybe_mirror(center_crop(image, size), rng)


def _center(image: np.ndarray, size: int) -> list[np.ndarray]:
    return [center_crop(image, size)]


def _center_and_mirror(image: np.ndarray, size: int) -> list[np.ndarray]:
    crop = center_crop(image, size)
    return [crop, _mirror(crop)]


def _center_only(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    del rng
    return center_crop(image, size)


# Fixed sets of views that an image is tokenized in: name -> (number of views, image and size -> views).
AUGMENTATIONS: dict[str, tuple[int, Callable[[np.ndarray, int], list[np.ndarray]]]] = {
    "center": (1, _center),
    "flip": (2, _center_and_mirror),
    "ten_crop": (10, ten_crop),
}

# One random view per visit, for training on pixels.
RANDOM_VIEWS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "none": _center_only,
    "flip": center_crop_flip,
    "crop_flip": random_crop_flip,
    "wide_crop_flip": functools.partial(random_crop_flip, largest=WIDE_RANGE),
    "bicubic": bicubic_center_crop,
    "window_flip": functools.partial(random_crop_flip, largest=1.0),
}


def _resize_short_side(image: np.ndarray, short_side: int) -> np.ndarray:
    """Box-filtered halvings while the short side is at least twice the target, then one bicubic step."""
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * short_side:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = short_side / min(picture.size)
    target = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(target, resample=Image.Resampling.BICUBIC))


def _five_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Corners and centre in torchvision's order and rounding (halves to even)."""
    bottom, right = image.shape[0] - size, image.shape[1] - size
    middle = (round(bottom / 2.0), round(right / 2.0))
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    return [_window(image, top, left, size) for top, left in [*corners, middle]]


def _window(image: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    return image[top : top + size, left : left + size]


def _mirror(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


def _maybe_mirror(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _mirror(image) if rng.random() < 0.5 else image
