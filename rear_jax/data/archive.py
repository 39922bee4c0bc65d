"""Sets of images in one .npz, as samples are exchanged: `arr_0` uint8 [n, H, W, 3], read piece by piece.

So are `samples.npz` of --job=sample and the reference batches of ADM's evaluator (`VIRTUAL_imagenet256_labeled.npz`),
which also hold statistics of Inception's features: `mu`, `sigma` of the pooled and `mu_s`, `sigma_s` of the spatial.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime.array_files import ArrayArchive, open_npz

IMAGES = "arr_0"
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


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
        with open_npz(path, remedy) as arrays:
            self.names = tuple(arrays.members)
            self.shape = _image_shape(arrays) if IMAGES in self.names else None
            members = arrays.members.values()
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
        with open_npz(self.path, self._remedy) as arrays, arrays.opened(IMAGES) as (_, member):
            for start in range(0, count, size):
                wanted = min(size, count - start)
                yield np.frombuffer(_read(member, wanted * int(np.prod(image))), np.uint8).reshape(wanted, *image)
            member.read(1)  # the end, where the checksum is compared

    def read(self, name: str) -> np.ndarray:
        """One of the other, smaller arrays, whole.

        Raises RearError: there is none of that name, or it is damaged.
        """
        with open_npz(self.path, self._remedy) as arrays:
            return arrays.read(name)


def _image_shape(arrays: ArrayArchive) -> tuple[int, ...]:
    shape, fortran, dtype = arrays.header(IMAGES)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise ValueError(f"{IMAGES} is {dtype} {shape}, wanted uint8 [n, H, W, 3] in C order")
    return shape


def _read(member: BinaryIO, count: int) -> bytes:
    data = member.read(count)
    if len(data) < count:
        raise EOFError(f"{IMAGES} ends early")
    return data
