"""Image files in class folders inside .zip or plain .tar files, which stay packed.

The order is that of the same folders unpacked: by class, then by name. The index comes from the directories of the
archives; no image is read for it. Names in an archive never lead to a place on the disk.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import ZIP_STORED

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.classes import by_training, numbered
from rear_jax.data.sources.decoding import is_hidden, is_image
from rear_jax.data.sources.encoded import EncodedImages
from rear_jax.data.sources.files import SPLIT, split_files
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.kept_index import Arrays, kept_index
from rear_jax.data.sources.tar_members import COMPRESSED_SUFFIXES, Member, headers, read_member
from rear_jax.data.sources.zip_members import Packed, read_packed, zip_directory
from rear_jax.errors import RearError

ZIP, TAR = ".zip", ".tar"
SUFFIXES = (ZIP, TAR, *COMPRESSED_SUFFIXES)  # the last ones are refused by name
NAMED = 5  # folders that a message names


class ArchivedImages(EncodedImages):
    """The images of some archives."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        index: Arrays,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        digits: str,
        broken: Broken,
    ):
        """`index` as of `_index`; `labels`: int64 [n]; `digits`: the `contents`."""
        super().__init__(name, len(class_names), class_names, broken)
        self._files, self._table, self._names, self._labels = files, index["table"], index["names"], labels
        self.contents = digits

    def __len__(self) -> int:
        return len(self._table)

    def _read(self, index: int) -> tuple[bytes, int]:
        number, *place = self._table[index].tolist()
        file, packed = self._files[number], Packed(*place)
        if file.suffix == ZIP:
            return read_packed(file, packed), int(self._labels[index])
        return read_member(file, Member(packed.start, packed.size)), int(self._labels[index])

    def _where(self, index: int) -> str:
        name = self._names.tobytes().split(b"\0")[index].decode("utf-8", "surrogateescape")
        return f"{self._files[self._table[index, 0]]}, {name}"


def open_archive(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    files, inside = _archives(path, split)
    name = files[0].parent.name if len(files) > 1 else files[0].stem
    index = _kept(files, inside)
    broken = Broken(name, settings.max_broken_share)
    warn_of_left_out(name, Tally.of_arrays(index, "left_out"))
    broken.skip(Tally.of_arrays(index, "broken"), good=len(index["table"]))
    if not len(index["table"]):
        there = ", ".join(index["folders"].tolist()) or "none"
        raise RearError(
            f"{files[0]} has no images in {inside + '/' if inside else ''}<class>/; its folders are: {there}; set the "
            "split to one of them, or to '' if classes are in the archive at once"
        )
    labels, names = by_training(index["class_names"].tolist(), index["labels"], settings.class_names, path)
    digits = contents.of_files(files, inside, names)
    return ArchivedImages(name, files, index, labels, names, digits, broken)


def class_names(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the class folders of a split, sorted; raises RearError as `open_archive`."""
    del settings
    return tuple(_kept(*_archives(path, split))["class_names"].tolist())


def _archives(path: str, split: str) -> tuple[tuple[Path, ...], str]:
    """The archives of a split, and in which folder of them it is."""
    file = Path(path).expanduser()
    if SPLIT in path or not file.is_file():
        return split_files(path, split, SUFFIXES), ""
    if not file.name.endswith(SUFFIXES):
        raise RearError(f"{file} is neither a {ZIP} nor a {TAR} file; give it a name that says which, or another file")
    return (file,), split


def _kept(files: Sequence[Path], inside: str) -> Arrays:
    return kept_index(files, f"archive {inside}", lambda: _index(files, inside))


class _Image(NamedTuple):
    class_name: str
    name: str  # in its class folder
    file: int
    place: Packed
    path: str  # in the archive


def _index(files: Sequence[Path], inside: str) -> Arrays:
    """What is kept of archives.

    `table` int64 [n, 6] has the number of the archive and the values of `Packed`, `names` the paths in the archives,
    with NUL between them; a tar has no packing.
    """
    images: dict[tuple[str, str, int], _Image] = {}
    broken, left_out, folders = Tally(), Tally(), set()
    for number, file in enumerate(files):
        found, tops = _images_of(file, number, inside, len(files) == 1, broken, left_out)
        folders |= tops
        for image in found:
            key = (image.class_name, image.name, number)
            if key in images:
                left_out.add(f"{file}: {image.path}, of which there is a later one")
            images[key] = image
    ordered = [images[key] for key in sorted(images)]
    names, labels = numbered([image.class_name for image in ordered])
    paths = "\0".join(image.path for image in ordered).encode("utf-8", "surrogateescape")
    return {
        "table": np.array([(image.file, *image.place) for image in ordered], np.int64).reshape(-1, 6),
        "names": np.frombuffer(paths, np.uint8),
        "labels": labels,
        "class_names": np.array(names, np.str_),
        "folders": np.array(sorted(folders)[:NAMED], np.str_),
        **broken.arrays("broken"),
        **left_out.arrays("left_out"),
    }


def _images_of(
    file: Path, number: int, inside: str, alone: bool, broken: Tally, left_out: Tally
) -> tuple[list[_Image], set[str]]:
    """The images of an archive that are in class folders of the split, and the folders of the archive.

    What is broken or left out counts where the split holds it. One folder around everything does not count. Of several
    archives, one without folders is a class by itself.
    """
    members = list(_plain_members(file, left_out))
    pictures = [parts for parts, _, place in members if place is not None]
    around = {parts[0] for parts in pictures}
    deep = any(len(parts) > 2 for parts in pictures) and all(len(parts) > 1 for parts in pictures)
    start = 1 if len(around) == 1 and deep and around != {inside} else 0
    folders = {parts[start] for parts in pictures if len(parts) > start + 1}
    above = [] if alone or folders else [file.stem]
    images = []
    for parts, path, place in members:
        within = [*above, *parts[start:]]
        if inside and within[:1] != [inside]:
            continue  # of another split
        match within[1:] if inside else within:
            case [class_name, name] if isinstance(place, Packed):
                images.append(_Image(class_name, name, number, place, path))
            case [_, _] if place is not None:
                broken.add(f"{file}, {path}: {place}")
            case _:
                left_out.add(f"{file}: {path}")
    return images, folders


def _plain_members(file: Path, left_out: Tally) -> Iterator[tuple[list[str], str, Packed | str | None]]:
    """Members by the parts of their paths, and by these, of an archive, which is read to its end.

    With each comes where it lies, why it cannot be read, or None where it is no image. What lies outside the archive
    is of no split.
    """
    for name, place in _members(file):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if any(is_hidden(part) for part in parts if part != ".."):
            continue
        if name.startswith("/") or ".." in parts:
            left_out.add(f"{file}: {name}")
        else:
            yield parts, "/".join(parts), place if is_image(name) else None


def _members(file: Path) -> Iterator[tuple[str, Packed | str | None]]:
    """Names of the members that are no folders, and where each lies, or why it cannot be read; None: it is no file."""
    if file.suffix == ZIP:
        yield from zip_directory(file)
        return
    for info in headers(file):
        if info.isreg() and not info.issparse():
            yield info.name, Packed(info.offset_data, info.size, info.size, ZIP_STORED, 0)
        elif not info.isdir():
            yield info.name, None
