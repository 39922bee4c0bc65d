"""Image files in class folders."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.classes import renumbered
from rear_jax.data.sources.contents import State
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES, is_hidden, is_image
from rear_jax.data.sources.encoded import EncodedImages
from rear_jax.data.sources.files import is_folder, listed, located, split_folder
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.errors import RearError

ONE_CLASS = "image"  # what the class of images without classes is called


class FolderSource(EncodedImages):
    """Image files, sorted by class name and then by file name."""

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        name: str,
        class_names: tuple[str, ...],
        digits: str,
        broken: Broken,
    ):
        """`digits` are the `contents` of the files."""
        super().__init__(name, len(class_names), class_names, broken)
        self.files, self.labels, self.contents = tuple(files), tuple(labels), digits

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> tuple[Path, int]:
        return self.files[index], self.labels[index]

    def _where(self, index: int) -> str:
        return str(self.files[index])


def open_folder(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    root, left_out = split_folder(path, split), Tally()
    classes = class_folders(path, split, settings)
    for entry in listed(root):
        if not is_hidden(entry.name) and entry.name not in classes:
            left_out.add(entry.path)
    if not classes:
        raise RearError(f"{root} holds no class folders; put the images in {root}/<class>/")
    numbers = renumbered(classes, settings.class_names, str(root))
    files: list[Path] = []
    states: list[State] = []
    labels: list[int] = []
    for label, class_name in zip(numbers.tolist(), classes, strict=True):
        found = _images(root / class_name, left_out)
        if not found:
            raise RearError(f"{root / class_name} holds no {' '.join(IMAGE_SUFFIXES)} files; fill or remove the folder")
        files += [root / class_name / name for name, _ in found]
        states += [(f"{class_name}/{name}", state) for name, state in found]
        labels += [label] * len(found)
    warn_of_left_out(root.name, left_out)
    names, broken = settings.class_names or classes, Broken(root.name, settings.max_broken_share)
    return FolderSource(files, labels, root.name, names, contents.of_states(states, names), broken)


def open_flat(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    root, left_out = located(path), Tally()
    divided = any(name and (root / name).is_dir() for name in (split, *settings.held_out.splits))
    folder = split_folder(path, split) if divided else root
    if not folder.is_dir():
        raise RearError(f"{folder} is no folder; give one with images")
    states = _images(folder, left_out)
    if not states:
        raise RearError(
            f"{folder} holds no {' '.join(IMAGE_SUFFIXES)} files; put images there, or use config.data.source = "
            "'folder' for class folders"
        )
    kept = [state for state in states if divided or settings.held_out.takes(split, state[0])]
    if not kept:
        raise RearError(
            f"none of the {len(states)} images in {folder} falls to the split {split!r}; set another "
            "config.data.held_out_share, or add images"
        )
    warn_of_left_out(folder.name, left_out)
    files, broken = [folder / name for name, _ in kept], Broken(folder.name, settings.max_broken_share)
    return FolderSource(files, [0] * len(files), folder.name, (ONE_CLASS,), contents.of_states(kept), broken)


def class_folders(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the class folders of a split, sorted; raises RearError where the split has no folder."""
    del settings
    return tuple(entry.name for entry in listed(split_folder(path, split)) if _is_class(entry))


def _is_class(entry: "os.DirEntry[str]") -> bool:
    return is_folder(entry) and not is_hidden(entry.name)


def _images(folder: Path, left_out: Tally) -> list[State]:
    """The images in a class folder, by name; a broken link is one, which cannot be read."""
    found = []
    for entry in listed(folder):
        if is_hidden(entry.name):
            continue
        state = contents.state_of(entry) if is_image(entry.name) else None
        if is_image(entry.name) and (state is None or stat.S_ISREG(state.st_mode)):
            found.append((entry.name, state))
        else:
            left_out.add(entry.path)
    return found
