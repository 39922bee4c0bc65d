"""Captions of text-conditional generators: features that a text encoder has made beforehand."""

import zipfile
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.models.llamagen import Captions


def read_captions(path: str, *, length: int, dim: int) -> Captions:
    """Reads captions and pads them on the left, as LlamaGen does.

    Args:
      path: an .npz with `features` [M, T, dim] and `mask` [M, T] (0 on padding, left or right), T at most `length`.
      length: positions that the generator has for a caption.
      dim: width of the features that it takes.

    Returns:
      features [M, length, dim] float32 (zero on padding) and mask [M, length] bool, each caption in its own order at
      the right end.

    Raises:
      RearError: the file is missing, not such an .npz, or has arrays of other shapes; features are not finite, or a
        caption is empty.
    """
    features, mask = _load(path)
    if features.ndim != 3 or features.shape[2] != dim or features.shape[1] > length or len(features) == 0:
        raise RearError(f"{path}: features are {features.shape}, wanted [captions, at most {length}, {dim}].")
    if mask.shape != features.shape[:2]:
        raise RearError(f"{path}: mask is {mask.shape}, wanted {features.shape[:2]} as the features have it.")
    mask = mask > 0
    if not mask.any(axis=1).all():
        raise RearError(f"{path}: caption {int(np.argmin(mask.any(axis=1)))} is all padding: leave it out.")
    order = np.argsort(mask, axis=1, kind="stable")  # padding first, each part in its order
    mask = np.take_along_axis(mask, order, axis=1)
    features = np.take_along_axis(features.astype(np.float32), order[:, :, None], axis=1)
    features = np.where(mask[:, :, None], features, np.float32(0))
    if not np.isfinite(features).all():
        raise RearError(f"{path}: features are not finite.")
    missing = length - mask.shape[1]
    return Captions(np.pad(features, ((0, 0), (missing, 0), (0, 0))), np.pad(mask, ((0, 0), (missing, 0))))


def _load(path: str) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays of the file."""
    if not Path(path).is_file():
        raise RearError(f"config.sample.captions = {path!r} is no file: name an .npz with features and mask.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["features"], file["mask"]
    except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise RearError(f"{path} is not an .npz with features and mask ({error}).") from error
