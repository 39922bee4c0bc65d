"""What a source of images is, with classes or with captions, and how much of it is read."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple, Protocol, SupportsIndex, TypeGuard

import numpy as np


class HeldOut(NamedTuple):
    """How images without splits are divided: each by a hash of its name, whatever other images there are.

    Attributes:
      splits: the names of the training split and of the held-out one.
      share: of the images that are held out, in (0, 1).
      seed: another one holds out other images.
    """

    splits: tuple[str, str] = ("", "")
    share: float = 0.05
    seed: int = 0

    def takes(self, split: str, name: str) -> bool:
        """Whether a split has the image of this name; where both splits are one, it has all of them."""
        training, held_out = self.splits
        if training == held_out or split not in self.splits:
            return True
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return (int.from_bytes(digest) < self.share * 2**64) == (split == held_out)


class SourceSettings(NamedTuple):
    """What of `config.data` says how a source is read; see there."""

    caption_key: str = "text"
    max_broken_share: float = 0.0
    class_names: tuple[str, ...] = ()  # by number, from the training split; () where a split numbers its own
    image_key: str = "image"
    label_key: str = "label"
    held_out: HeldOut = HeldOut()

    @property
    def unusual_keys(self) -> tuple[str, ...]:
        """The keys of images and labels, for `contents`; () for the usual ones."""
        usual = (self.image_key, self.label_key) == (STRICT.image_key, STRICT.label_key)
        return () if usual else (self.image_key, self.label_key)


STRICT = SourceSettings()  # nothing may be broken


class ImageSource(Protocol):
    """A sequence of labelled images.

    Attributes:
      name: what the source is called in headers and logs.
      num_classes: labels are in [0, num_classes).
      class_names: one name per class, or empty where they have none.
      contents: hexadecimal digits of all that is in it. They change with any image, label or caption, and where its
        files are others: by name, size or time of change.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def contents(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        """Image `index` as uint8 [H, W, 3] and its label."""
        ...


class CaptionedSource(ImageSource, Protocol):
    """A sequence of images that have a caption each; the label of an image is the number of its caption.

    Caption i belongs to image i, so `num_classes` is the number of images.
    """

    def caption(self, index: SupportsIndex) -> str:
        """Caption `index`, without white space around it and never empty."""
        ...


def captioned(source: ImageSource) -> TypeGuard[CaptionedSource]:
    """Whether the labels of a source are the numbers of its captions."""
    return hasattr(source, "caption")


class SourceKind(NamedTuple):
    """A kind of source.

    Attributes:
      open: (path, split, settings) opens a split, see `open_source`.
      class_names: (path, split, settings) gives the names of the classes of a split by number, () where it has none;
        None for a kind whose numbers mean the same in every split.
    """

    open: Callable[[str, str, SourceSettings], ImageSource]
    class_names: Callable[[str, str, SourceSettings], tuple[str, ...]] | None = None


class Spread:
    """At most `count` images of a source, evenly spread, so that a set sorted by class stays balanced."""

    def __init__(self, source: ImageSource, count: int):
        self._source, self._indices = source, spread(len(source), count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        return self._source[int(self._indices[int(index)])]


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices of `total`, evenly spread."""
    count = min(total, wanted)
    return np.arange(count) * total // count
