"""Image files in class folders."""

from collections.abc import Sequence
from pathlib import Path

from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES, is_hidden, is_image
from rear_jax.data.sources.encoded import EncodedImages
from rear_jax.data.sources.files import split_folder
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.errors import RearError


class FolderSource(EncodedImages):
    """Image files, sorted by class name and then by file name."""

    def __init__(
        self, files: Sequence[Path], labels: Sequence[int], name: str, class_names: tuple[str, ...], broken: Broken
    ):
        super().__init__(name, len(class_names), class_names, broken)
        self.files, self.labels = tuple(files), tuple(labels)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> tuple[Path, int]:
        return self.files[index], self.labels[index]

    def _where(self, index: int) -> str:
        return str(self.files[index])


def open_folder(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    root, left_out = split_folder(path, split), Tally()
    entries = sorted(entry for entry in root.iterdir() if not is_hidden(entry.name))
    classes = [entry.name for entry in entries if entry.is_dir()]
    for entry in entries:
        if not entry.is_dir():
            left_out.add(str(entry))
    files: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = _images(root / class_name, left_out)
        if not found:
            raise RearError(f"{root / class_name} holds no {' '.join(IMAGE_SUFFIXES)} files; fill or remove the folder")
        files += found
        labels += [label] * len(found)
    if not files:
        raise RearError(f"{root} holds no class folders; put the images in {root}/<class>/")
    warn_of_left_out(root.name, left_out)
    return FolderSource(files, labels, root.name, tuple(classes), Broken(root.name, settings.max_broken_share))


def _images(folder: Path, left_out: Tally) -> list[Path]:
    """The images in a class folder, by name."""
    found = []
    for entry in sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name)):
        if is_image(entry.name) and not entry.is_dir():
            found.append(entry)
        else:
            left_out.add(str(entry))
    return found
