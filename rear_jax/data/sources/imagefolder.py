"""Image files with captions or classes, named by a metadata.jsonl or metadata.csv beside them.

The form is that of `imagefolder` in Hugging Face datasets: each line or row has `file_name`, a path from the folder of
the metadata file, and the caption under a key of its own; where there is none, the class. Only the place of each row is
kept in memory, and the number of its class.
"""

import os
import posixpath
import stat
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.classes import by_training, numbered, numbers_as_names
from rear_jax.data.sources.decoding import is_hidden, is_image
from rear_jax.data.sources.encoded import EncodedImages, EncodedPairs
from rear_jax.data.sources.files import is_folder, listed, split_folder
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.metadata import Csv, JsonLines, Metadata
from rear_jax.data.sources.texts import caption_at, class_at, text_at
from rear_jax.errors import RearError

FILE_NAME = "file_name"
METADATA = ("metadata.jsonl", "metadata.csv")  # names of the metadata file


class Rows(NamedTuple):
    """The good rows of a metadata file.

    Attributes:
      metadata: the file.
      places: int64 [n, 2], start and size in bytes of each row.
    """

    metadata: Metadata
    places: np.ndarray

    def where(self, index: int) -> str:
        """Names a row."""
        return f"{self.metadata.path}, byte {self.places[index, 0]}"

    def record(self, index: int) -> dict[str, Any]:
        """A row; raises OSError or ValueError where the file is not as it was."""
        start, size = self.places[index].tolist()
        with self.metadata.path.open("rb") as file:
            file.seek(start)
            return self.metadata.record(file.read(size))

    def image(self, index: int) -> Path:
        """The file of an image; raises RearError where the row is not as it was."""
        try:
            return self.metadata.path.parent / _file_name(self.record(index), self.metadata.path)
        except (OSError, ValueError) as error:
            raise RearError(f"{self.where(index)} can no longer be read ({error}); start the run again") from None


class ImageFolder(EncodedPairs):
    """The images and captions of a metadata file, in its order."""

    def __init__(self, name: str, rows: Rows, caption_key: str, digits: str, broken: Broken):
        """`digits`: the `contents`."""
        super().__init__(name, len(rows.places), broken)
        self._rows, self._caption_key, self.contents = rows, caption_key, digits

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _caption(self, index: int) -> str:
        return caption_at(self._rows.record(index), self._caption_key)

    def _image(self, index: int) -> Path:
        return self._rows.image(index)


class LabelledFolder(EncodedImages):
    """The images and classes of a metadata file, in its order."""

    def __init__(
        self, name: str, rows: Rows, labels: np.ndarray, class_names: tuple[str, ...], digits: str, broken: Broken
    ):
        """`labels`: int64 [n]; `digits`: the `contents`."""
        super().__init__(name, len(class_names) or int(labels.max()) + 1, class_names, broken)
        self._rows, self._labels, self.contents = rows, labels, digits

    def __len__(self) -> int:
        return len(self._labels)

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _read(self, index: int) -> tuple[Path, int]:
        return self._rows.image(index), int(self._labels[index])


def open_imagefolder(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    root = split_folder(path, split)
    metadata = _metadata(root)
    captioned = _captioned(metadata, settings)
    beside = settings.caption_key if captioned else settings.label_key
    images = image_states(root)
    rowless, linked = set(images), {}
    broken, places = Tally(), array("q")  # start and size of each row in turn
    labels: list[int | str] = []
    for start, raw in metadata.rows():
        try:
            record = metadata.record(raw)
            name = _file_name(record, metadata.path)
            found = name in images
            if not found and os.path.isfile(root / name):  # by way of a link to a folder
                found, linked[name] = True, contents.state_of(root / name)
            rowless.discard(name)
            label = caption_at(record, beside) if captioned else class_at(record, beside)
            if not found:
                raise ValueError(f"there is no image {name}")
        except ValueError as error:
            broken.add(f"{metadata.path.name}, byte {start}: {error}")
        else:
            places.extend((start, len(raw)))
            labels += [] if captioned else [label]
    for name in sorted(rowless):
        broken.add(f"{name} has no row in {metadata.path.name}")
    share = Broken(root.name, settings.max_broken_share)
    share.skip(broken, good=len(places) // 2)
    if not places:
        raise RearError(f"{metadata.path} has no rows; give each image one with {FILE_NAME} and {beside}")
    states = [*images.items(), *sorted(linked.items()), (metadata.path.name, contents.state_of(metadata.path))]
    rows = Rows(metadata, np.array(places).reshape(-1, 2))
    if captioned:
        return ImageFolder(root.name, rows, beside, contents.of_states(states, beside), share)
    own = numbers_as_names(*numbered(labels), settings.class_names)
    numbers, names = by_training(*own, settings.class_names, str(root))
    return LabelledFolder(root.name, rows, numbers, names, contents.of_states(states, beside, names), share)


def class_names(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the classes of a split by number, () where they are numbers; raises RearError as `open_imagefolder`."""
    if _captioned(_metadata(split_folder(path, split)), settings):
        return ()
    return open_imagefolder(path, split, settings).class_names


def _captioned(metadata: Metadata, settings: SourceSettings) -> bool:
    """Whether captions are taken, by the first row that can be read."""
    for row in metadata.rows():
        try:
            record = metadata.record(row.raw)
        except ValueError:
            continue
        return settings.caption_key in record or (bool(settings.caption_key) and settings.label_key not in record)
    return bool(settings.caption_key)


def _metadata(root: Path) -> Metadata:
    """The metadata file of a folder; raises RearError unless there is one that names images."""
    kinds = dict(zip(METADATA, (JsonLines, Csv), strict=True))
    found = [name for name in kinds if (root / name).is_file()]
    if len(found) != 1:
        raise RearError(f"{root} holds {'both' if found else 'neither'} of {' and '.join(kinds)}; it needs one of them")
    if not os.access(root / found[0], os.R_OK):
        raise RearError(f"{root / found[0]} may not be read; change its permissions")
    return kinds[found[0]](root / found[0])


def image_states(root: Path) -> dict[str, os.stat_result | None]:
    """Image files in a folder and the folders in it by their paths from there; other files are counted in the log.

    Links to folders are not followed; what a link to nothing is of is None.
    """
    images: dict[str, os.stat_result | None] = {}
    left_out, folders = Tally(), [""]
    while folders:
        inside = folders.pop()
        for entry in listed(root / inside):
            name = inside + entry.name
            if is_hidden(entry.name) or name in METADATA:
                continue
            if is_folder(entry):
                folders += [] if entry.is_symlink() else [f"{name}/"]
                continue
            state = contents.state_of(entry) if is_image(name) else None
            if is_image(name) and (state is None or stat.S_ISREG(state.st_mode)):
                images[name] = state
            else:
                left_out.add(name)
    warn_of_left_out(root.name, left_out)
    return images


def is_plain(name: str) -> bool:
    """Whether a row can give this file name: it is UTF-8, and no white space is around it."""
    return name == name.strip() and not any("\ud800" <= sign <= "\udfff" for sign in name)


def _file_name(record: Mapping[str, Any], metadata: Path) -> str:
    """Where an image is, from the folder of the metadata.

    Raises ValueError: there is no such text.
    Raises RearError: it leads out of the folder.
    """
    name = posixpath.normpath(text_at(record, FILE_NAME))
    if name.startswith(("/", "../")) or name == "..":
        raise RearError(f"{metadata} names {name!r}, which is outside its folder; move the image into the folder")
    return name
