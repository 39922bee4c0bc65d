"""What is in a source of images: counts by class, sizes, formats, broken files, and some images to look at."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_jax.data.crops import center_crop
from rear_jax.data.sources.decoding import Look, examine
from rear_jax.data.sources.encoded import EncodedImages
from rear_jax.data.sources.interface import ImageSource, captioned, spread
from rear_jax.errors import RearError
from rear_jax.runtime.progress import ProgressBar

THREADS = 8
AT_ONCE = 64  # images that the threads are given together
SHOWN_LABELS, SHOWN_OF_LABEL, SHOWN_SIDE = 16, 8, 64  # classes or captions, images of each, pixels
BROKEN_NAMED = 1000  # files that are named, at most


@dataclasses.dataclass
class Inspection:
    """What was found in the images of a split.

    Attributes:
      good, broken: how many images of each label are which; captions count as one label.
      lost: broken images whose label is not known.
      reasons: what is wrong with the first broken ones.
      looks: how many good images look the same.
      size: bytes of the good images as they lie on the disk, 0 for those of arrays.
      shown: uint8 images [S, S, 3] of some labels.
    """

    good: Counter[int] = dataclasses.field(default_factory=Counter)
    broken: Counter[int] = dataclasses.field(default_factory=Counter)
    lost: int = 0
    reasons: list[str] = dataclasses.field(default_factory=list)
    looks: Counter[Look] = dataclasses.field(default_factory=Counter)
    size: int = 0
    shown: dict[int, list[np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def num_broken(self) -> int:
        """How many images cannot be read."""
        return self.broken.total() + self.lost

    def counts_of(self, *fields: str) -> dict[str, int]:
        """How many good images have each value of some fields of `Look`, the most frequent first."""
        counts: Counter[str] = Counter()
        for look, count in self.looks.items():
            counts[" x ".join(str(getattr(look, field)) for field in fields)] += count
        return dict(counts.most_common())

    def short_sides(self) -> np.ndarray:
        """The shorter side of each good image in pixels, ascending int64."""
        sides = np.array([min(look.width, look.height) for look in self.looks], np.int64)
        return np.sort(np.repeat(sides, list(self.looks.values())))


class _Seen(NamedTuple):
    """An image: its label and what it is, or why it cannot be read."""

    label: int | None
    look: Look | None = None
    size: int = 0
    shown: np.ndarray | None = None
    reason: str = ""


def inspect(source: ImageSource, num_images: int, title: str) -> Inspection:
    """Decodes images of a source in several threads, under a progress bar; broken ones are counted and named.

    Args:
      source: the split.
      num_images: how many are looked at, evenly spread; 0 = all.
      title: of the progress bar.
    """
    indices, found = spread(len(source), num_images or len(source)), Inspection()
    labels = spread(source.num_classes, SHOWN_LABELS).tolist()
    with ProgressBar(title, total=len(indices), unit="image") as bar:
        for some in bar.over(_seen(source, indices, labels)):
            for one in some:
                _add(found, one, 0 if captioned(source) and one.label is not None else one.label)
    return found


def _add(found: Inspection, one: _Seen, label: int | None) -> None:
    if one.look is None:
        found.broken.update([] if label is None else [label])
        found.lost += label is None
        found.reasons += [one.reason] if len(found.reasons) < BROKEN_NAMED else []
        return
    found.good[label] += 1
    found.looks[one.look] += 1
    found.size += one.size
    if one.shown is not None and len(found.shown.setdefault(one.label, [])) < SHOWN_OF_LABEL:
        found.shown[one.label].append(one.shown)


def _seen(source: ImageSource, indices: np.ndarray, shown: Collection[int]) -> Iterator[list[_Seen]]:
    """Images in order, some at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(indices), AT_ONCE):
            some = indices[start : start + AT_ONCE].tolist()
            yield list(pool.map(lambda index: _see(source, index, shown), some))


def _see(source: ImageSource, index: int, shown: Collection[int]) -> _Seen:
    label = None
    try:
        if isinstance(source, EncodedImages):
            encoded, label = source.encoded(index)
            image, look = examine(encoded, source.where(index))
            size = encoded.stat().st_size if isinstance(encoded, Path) else len(encoded)
        else:
            image, label = source[index]
            look, size = Look("array", "RGB", image.shape[1], image.shape[0]), 0
    except RearError as error:
        return _Seen(label, reason=str(error))
    return _Seen(label, look, size, center_crop(image, SHOWN_SIDE) if label in shown else None)
