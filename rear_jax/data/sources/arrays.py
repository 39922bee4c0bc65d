"""Images in memory: an .npz file of arrays, or Fashion-MNIST."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from rear_jax.data import fashion_mnist
from rear_jax.data.fashion_captions import Claim, caption_of, claims
from rear_jax.data.sources import contents
from rear_jax.data.sources.decoding import eight_bits, require_sides
from rear_jax.data.sources.encoded import label_outside
from rear_jax.data.sources.files import located
from rear_jax.data.sources.interface import CaptionedSource, ImageSource, SourceSettings
from rear_jax.errors import RearError
from rear_jax.runtime.array_files import open_npz

FASHION_MNIST_MARGIN = 2  # pixels of background on each side: 28 -> 32


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory: uint8 [n, H, W, 3], or grey [n, H, W], and labels [n]."""

    images: np.ndarray
    labels: np.ndarray
    name: str
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        grey_or_rgb = self.images.ndim == 3 or (self.images.ndim == 4 and self.images.shape[3] == 3)
        if self.images.dtype != np.uint8 or not grey_or_rgb:
            raise RearError(
                f"{self.name}: images are {self.images.dtype} {self.images.shape}, wanted uint8 [n, H, W, 3]"
            )
        if self.labels.shape != self.images.shape[:1] or not np.issubdtype(self.labels.dtype, np.integer):
            raise RearError(
                f"{self.name}: labels are {self.labels.dtype} {self.labels.shape}, wanted one integer per image"
            )
        if self.images.size == 0:
            raise RearError(f"{self.name}: holds no images")
        try:
            require_sides(*self.images.shape[1:3])
        except ValueError as error:
            raise RearError(f"{self.name}: {error}; cut the images smaller") from None
        for label in (int(self.labels.min()), int(self.labels.max())):
            if not 0 <= label < self.num_classes:
                raise label_outside(label, self.num_classes, self.name)

    @functools.cached_property
    def contents(self) -> str:
        """See `ImageSource`."""
        return contents.of_arrays((self.images, self.labels), self.num_classes, self.class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return image, int(self.labels[index])


def open_fashion_mnist(path: str, split: str, settings: SourceSettings) -> ArraySource:
    """See `open_source`."""
    del settings
    if path:
        images, labels = fashion_mnist.load_full(located(path), split)
    else:
        images, labels = fashion_mnist.load_embedded(split)
    margin = (FASHION_MNIST_MARGIN, FASHION_MNIST_MARGIN)
    images = np.pad(images, ((0, 0), margin, margin))
    return ArraySource(images, labels, "fashion_mnist", len(fashion_mnist.CLASS_NAMES), fashion_mnist.CLASS_NAMES)


@dataclass(frozen=True)
class FashionCaptions:
    """Fashion-MNIST with captions that say what is in the image, see `fashion_captions`.

    Attributes:
      source: the images with their classes.
      claims: what is true of each image.
    """

    source: ArraySource
    claims: tuple[Claim, ...]
    name: str = "fashion_captions"
    class_names: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.claims)

    @property
    def contents(self) -> str:
        """See `ImageSource`; captions follow from images and classes."""
        return self.source.contents

    def __len__(self) -> int:
        return len(self.claims)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        return self.source[index][0], int(index) % len(self)

    def caption(self, index: SupportsIndex) -> str:
        """Caption `index`."""
        return caption_of(self.claims[index], int(index))


def open_fashion_captions(path: str, split: str, settings: SourceSettings) -> CaptionedSource:
    """See `open_source`."""
    source = open_fashion_mnist(path, split, settings)
    return FashionCaptions(source, tuple(claims(source.images, source.labels.astype(int))))


def open_arrays(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    del settings
    file = located(path)
    if not file.is_file():
        raise RearError(f"{file} is no file; give the .npz itself as config.data.path")
    prefix = f"{split}_" if split else ""
    with open_npz(file, f"give an .npz with the arrays {prefix}images and {prefix}labels") as arrays:
        images, labels = arrays.read(f"{prefix}images"), arrays.read(f"{prefix}labels")
        num_classes = int(arrays.read("num_classes").item()) if "num_classes" in arrays.members else _count(labels)
    return ArraySource(_as_bytes(images, file), _one_a_row(labels), file.stem, num_classes)


def _as_bytes(images: np.ndarray, file: Path) -> np.ndarray:
    """Images as uint8; others are taken as 8 bits where all of them fit, and as 16 where they are uint16.

    [n, H, W, 1] is grey; what is no image is left as it is.
    """
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype == np.uint8 or not np.issubdtype(images.dtype, np.integer) or not images.size:
        return images
    white = 65535 if images.dtype == np.uint16 and images.max() > 255 else 255
    try:
        return np.stack([eight_bits(image, white) for image in images])
    except ValueError as error:
        raise RearError(f"{file}: {error}; store the images as uint8") from None


def _count(labels: np.ndarray) -> int:
    """How many classes labels speak of."""
    return int(labels.max()) + 1 if labels.size else 0


def _one_a_row(labels: np.ndarray) -> np.ndarray:
    """Labels [n, 1] as [n]; others are left as they are."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
