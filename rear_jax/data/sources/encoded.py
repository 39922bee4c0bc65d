"""Images that lie encoded on a disk: each is decoded when it is asked for, and stood in for where it is broken."""

import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from rear_jax.data.sources.broken import Broken
from rear_jax.data.sources.decoding import decode
from rear_jax.errors import RearError


class EncodedImages(ABC):
    """A source whose kinds say where an encoded image lies and what its label is.

    The next readable image, with its own label, stands in for one that is broken; the first follows the last.
    """

    def __init__(self, name: str, num_classes: int, class_names: tuple[str, ...], broken: Broken):
        self.name, self.num_classes, self.class_names = name, num_classes, class_names
        self._broken = broken

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> tuple[Path | bytes, int]:
        """The file of an image, or what is in it, and the label; raises RearError where the image is lost."""

    @abstractmethod
    def _where(self, index: int) -> str:
        """Names an image in messages."""

    def encoded(self, index: int) -> tuple[Path | bytes, int]:
        """An image as it lies on the disk, and its label; raises RearError where it is lost."""
        return self._read(index)

    def where(self, index: int) -> str:
        """Names an image."""
        return self._where(index)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        place = self._place(index)
        while True:
            try:
                encoded, label = self._read(place)
                image = decode(encoded, self._where(place))
            except RearError as error:
                self._broken.replace(place, len(self), str(error))
                place = (place + 1) % len(self)
            else:
                if not 0 <= label < self.num_classes:
                    raise label_outside(label, self.num_classes, self._where(place))
                return image, label

    def _place(self, index: SupportsIndex) -> int:
        """An index, which counts from the end where it is negative; raises IndexError outside the source."""
        return range(len(self))[operator.index(index)]


class EncodedPairs(EncodedImages):
    """A captioned source of this form."""

    def __init__(self, name: str, length: int, broken: Broken):
        super().__init__(name, length, (), broken)

    def __len__(self) -> int:
        return self.num_classes

    @abstractmethod
    def _image(self, index: int) -> Path | bytes:
        """The file of an image, or what is in it; raises RearError where that is lost."""

    def _read(self, index: int) -> tuple[Path | bytes, int]:
        return self._image(index), index

    @abstractmethod
    def _caption(self, index: int) -> str:
        """A caption; raises ValueError where the file is not as it was when it was opened."""

    def caption(self, index: SupportsIndex) -> str:
        """Caption `index`; raises RearError where it can no longer be read."""
        place = self._place(index)
        try:
            return self._caption(place)
        except (OSError, ValueError) as error:
            raise RearError(
                f"{self._where(place)}: its caption can no longer be read ({error}); start the run again"
            ) from None


def label_outside(label: int, num_classes: int, where: str) -> RearError:
    """What to raise on a label that is no class."""
    return RearError(f"{where}: label {label} is outside [0, {num_classes}); correct the labels or num_classes")
