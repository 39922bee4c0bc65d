"""Captions of text-conditional generators: features that a text encoder has made beforehand.

`open_captions` opens what `--job=caption` wrote (`caption_shards.py`), or a file of somebody else's (`CaptionFile`).
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rear_jax.data.caption_shards import HEADER, UNFINISHED_HEADER, CaptionShards
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.runtime import places
from rear_jax.runtime.array_files import ArrayArchive, Header, map_npy, open_npz

REMEDY = "it does not hold captions as features and mask; write it again"


def open_captions(path: str, *, option: str, length: int, dim: int) -> "CaptionFile | CaptionShards":
    """Captions by number: `captions[numbers]` is `Captions` [m, length, dim], each at the right end.

    Args and errors are those of `CaptionFile`, and of `CaptionShards`.
    """
    if any((places.place(path) / name).is_file() for name in (HEADER, UNFINISHED_HEADER)):
        return CaptionShards(places.place(path), length=length, dim=dim)
    return CaptionFile(path, option=option, length=length, dim=dim)


class CaptionFile:
    """Captions on disk, padded on the left when they are asked for, as LlamaGen does.

    Features are read when captions are first asked for: those of an .npz whole; those of a folder are memory-mapped, so
    that only these captions are read.
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
        if not path or not places.place(path).exists():
            raise RearError(
                f"{option} = {path!r} does not exist: name an .npz with features and mask, or a folder with "
                "features.npy and mask.npy."
            )
        with _opened(path) as arrays:
            (shape, _, dtype), mask = arrays.header("features"), arrays.read("mask")
        if not jnp.issubdtype(dtype, jnp.floating) or mask.dtype.kind not in "biuf":
            raise RearError(f"{path}: features are {dtype} and the mask {mask.dtype}, wanted floats and 0 or 1.")
        if len(shape) != 3 or shape[2] != dim or shape[1] > length or shape[0] == 0:
            raise RearError(f"{path}: features are {shape}, wanted [captions, at most {length}, {dim}].")
        if mask.shape != shape[:2]:
            raise RearError(f"{path}: mask is {mask.shape}, wanted {shape[:2]} as the features have it.")
        self._mask = np.asarray(mask) > 0
        if not self._mask.any(axis=1).all():
            raise RearError(f"{path}: caption {int(np.argmin(self._mask.any(axis=1)))} is all padding: leave it out.")

    @functools.cached_property
    def _features(self) -> np.ndarray:
        with _opened(self.path) as arrays:
            return arrays.read("features")

    def __len__(self) -> int:
        return len(self._mask)

    def __getitem__(self, numbers: np.ndarray | slice) -> Captions:
        """Some captions by number.

        Returns:
          features [m, length, dim] float32 (zero on padding) and mask [m, length] bool, each caption in its own order
          at the right end.

        Raises RearError: features are not finite, or there are not so many captions.
        """
        if not isinstance(numbers, slice) and len(numbers) and not 0 <= np.min(numbers) <= np.max(numbers) < len(self):
            raise RearError(f"{self.path} has {len(self)} captions: none has the number {int(np.max(numbers))}.")
        mask, features = self._mask[numbers], self._features[numbers].astype(np.float32)
        order = np.argsort(mask, axis=1, kind="stable")  # padding first, each part in its order
        mask = np.take_along_axis(mask, order, axis=1)
        features = np.take_along_axis(features, order[:, :, None], axis=1)
        features = np.where(mask[:, :, None], features, np.float32(0))
        if not np.isfinite(features).all():
            raise RearError(f"{self.path}: features are not finite.")
        missing = self._length - mask.shape[1]
        return Captions(np.pad(features, ((0, 0), (missing, 0), (0, 0))), np.pad(mask, ((0, 0), (missing, 0))))


class _Folder:
    """A folder of .npy files, memory-mapped, with what of `ArrayArchive` is needed here."""

    def __init__(self, path: Path):
        self._path = path

    def header(self, name: str) -> Header:
        array = self.read(name)
        return Header(array.shape, False, array.dtype)

    def read(self, name: str) -> np.ndarray:
        return map_npy(self._path / f"{name}.npy", REMEDY)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[ArrayArchive | _Folder]:
    """The arrays of a folder or of an .npz, each read when it is asked for; RearError where they cannot be."""
    if places.place(path).is_dir():
        yield _Folder(places.place(path))
        return
    with open_npz(path, REMEDY) as arrays:
        yield arrays
