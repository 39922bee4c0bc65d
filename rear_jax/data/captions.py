"""Captions of text-conditional generators: features that a text encoder has made beforehand."""

import zipfile
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions


class CaptionFile:
    """Captions on disk, padded on the left when they are asked for, as LlamaGen does.

    The features of a folder are memory-mapped: only the captions that are asked for are read. An .npz is read whole.
    """

    def __init__(self, path: str, *, option: str, length: int, dim: int):
        """Opens an .npz with `features` and `mask`, or a folder with features.npy and mask.npy.

        Args:
          path: holds `features` [M, T, dim] and `mask` [M, T] (0 on padding, left or right), T at most `length`.
          option: dotted name of the setting that chose `path`, for messages.
          length: positions that the generator has for a caption.
          dim: width of the features that it takes.

        Raises RearError: the file is missing, no such file, or has arrays of other shapes; a caption is empty.
        """
        self.path, self._length = path, length
        self._features, mask = _load(path, option)
        shape = self._features.shape
        if len(shape) != 3 or shape[2] != dim or shape[1] > length or shape[0] == 0:
            raise RearError(f"{path}: features are {shape}, wanted [captions, at most {length}, {dim}].")
        if mask.shape != shape[:2]:
            raise RearError(f"{path}: mask is {mask.shape}, wanted {shape[:2]} as the features have it.")
        self._mask = np.asarray(mask) > 0
        if not self._mask.any(axis=1).all():
            raise RearError(f"{path}: caption {int(np.argmin(self._mask.any(axis=1)))} is all padding: leave it out.")

    def __len__(self) -> int:
        return len(self._mask)

    def __getitem__(self, numbers: np.ndarray | slice) -> Captions:
        """Some captions by number.

        Returns:
          features [m, length, dim] float32 (zero on padding) and mask [m, length] bool, each caption in its own order
          at the right end.

        Raises RearError: features are not finite.
        """
        mask, features = self._mask[numbers], self._features[numbers].astype(np.float32)
        order = np.argsort(mask, axis=1, kind="stable")  # padding first, each part in its order
        mask = np.take_along_axis(mask, order, axis=1)
        features = np.take_along_axis(features, order[:, :, None], axis=1)
        features = np.where(mask[:, :, None], features, np.float32(0))
        if not np.isfinite(features).all():
            raise RearError(f"{self.path}: features are not finite.")
        missing = self._length - mask.shape[1]
        return Captions(np.pad(features, ((0, 0), (missing, 0), (0, 0))), np.pad(mask, ((0, 0), (missing, 0))))


def _load(path: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """The two arrays."""
    place = Path(path)
    if not path or not place.exists():
        raise RearError(
            f"{option} = {path!r} does not exist: name an .npz with features and mask, or a folder with features.npy "
            "and mask.npy."
        )
    try:
        if place.is_dir():
            return np.load(place / "features.npy", mmap_mode="r"), np.load(place / "mask.npy")
        with np.load(path, allow_pickle=False) as file:
            return file["features"], file["mask"]
    except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise RearError(f"{path} does not hold captions as features and mask ({error}).") from error
