"""Sets of images in one .npz, as samples are exchanged: `arr_0` uint8 [n, H, W, 3], read piece by piece.

So are `samples.npz` of --job=sample and the reference batches of ADM's evaluator (`VIRTUAL_imagenet256_labeled.npz`),
which also hold statistics of Inception's features: `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rear_jax.errors import RearError

IMAGES = "arr_0"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, OSError, NotImplementedError)


class ImageArchive:
    """An .npz of images and more, of which only what is asked for is read, and the images never all at once.

    Attributes:
      path: the file.
      names: of its arrays.
      fingerprint: sixteen hexadecimal digits that name its content (from the checksums that a zip file keeps).
      shape: (n, H, W, 3) of the images, or None where there are none.
    """

    def __init__(self, path: Path, *, remedy: str):
        """Opens the file and reads its directory.

        Args:
          path: the file.
          remedy: what a person can do about a file that is missing or damaged.

        Raises RearError: the file is missing or damaged, or its images are not uint8 [n, H, W, 3].
        """
        self.path, self._remedy = path, remedy
        if not path.is_file():
            raise RearError(f"{path} does not exist: {remedy}.")
        try:
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
                self.names = tuple(member.filename.removesuffix(".npy") for member in members)
                self.shape = self._image_shape(file) if IMAGES in self.names else None
        except BROKEN as error:
            raise self._unreadable(error) from error
        content = sorted((member.filename, member.CRC, member.file_size) for member in members)
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """All images in order, uint8 [b, H, W, 3] with b = size but for the last.

        Raises RearError: while iterating, the file turns out to be damaged.
        """
        if not self.shape:
            raise RearError(f"{self.path} has no images {IMAGES!r}: {self._remedy}.")
        count, *image = self.shape
        try:
            with zipfile.ZipFile(self.path) as file, file.open(f"{IMAGES}.npy") as member:
                read_header(member)
                for start in range(0, count, size):
                    wanted = min(size, count - start)
                    yield np.frombuffer(_read(member, wanted * int(np.prod(image))), np.uint8).reshape(wanted, *image)
                member.read(1)  # the end, where the checksum is compared
        except BROKEN as error:
            raise self._unreadable(error) from error

    def read(self, name: str) -> np.ndarray:
        """One of the other, smaller arrays, whole.

        Raises RearError: there is none of that name, or it is damaged.
        """
        try:
            with np.load(self.path) as file:
                return file[name]
        except BROKEN as error:
            raise self._unreadable(error) from error

    def _image_shape(self, file: zipfile.ZipFile) -> tuple[int, ...]:
        with file.open(f"{IMAGES}.npy") as member:
            shape, fortran, dtype = read_header(member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise ValueError(f"{IMAGES} is {dtype} {shape}, wanted uint8 [n, H, W, 3] in C order")
        return shape

    def _unreadable(self, error: Exception) -> RearError:
        return RearError(f"{self.path} cannot be read ({error}): {self._remedy}.")


def read_header(member: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a .npy, which is left at its first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def _read(member: BinaryIO, count: int) -> bytes:
    data = member.read(count)
    if len(data) < count:
        raise EOFError(f"{IMAGES} ends early")
    return data
