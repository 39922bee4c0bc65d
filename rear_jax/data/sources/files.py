"""Where the files of a source are."""

import glob
import os
from pathlib import Path

from rear_jax.data.sources.decoding import is_hidden
from rear_jax.errors import RearError

WILDCARDS = "*?["
SPLIT = "{split}"  # in a pattern, where the name of the split goes


def located(path: str) -> Path:
    """What `config.data.path` leads to; raises RearError where nothing is there."""
    place = Path(path).expanduser()
    if not path or not place.exists():
        raise RearError(f"the image path {path!r} does not exist; set it to where the images are")
    return place


def split_folder(path: str, split: str) -> Path:
    """The folder of a split; raises RearError where it is missing."""
    root = located(path) / split
    if not root.is_dir():
        raise RearError(f"{path} has no folder {split!r}; set the split to a folder in it, or to '' if it has none")
    return root


def listed(folder: Path) -> "list[os.DirEntry[str]]":
    """What is in a folder, by name; raises RearError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise RearError(f"{folder} cannot be read ({error.strerror}); change its permissions or remove it") from None


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder or leads to one; a link that leads in circles does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def split_files(path: str, split: str, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    """The files of a split, sorted.

    Args:
      path: a folder, with the files in `<path>/<split>/`, or in it or in `<path>/data/` and named `<split>-...` (or `.`
        or `_` for `-`); for the split '' in it by any name. Or the name of a file, or a pattern such as 'DIR/*.tar',
        for the split ''. A '{split}' in it stands for the split.
      split: name of the split, or ''.
      suffixes: of the names of the files.

    Raises RearError: there are none, or a pattern would give the same ones for every split.
    """
    place = Path(path.replace(SPLIT, split)).expanduser()
    one_set = any(sign in path for sign in WILDCARDS) and not place.exists()
    if (one_set or place.is_file()) and split and SPLIT not in path:
        raise RearError(f"{path} gives every split the same files; put {SPLIT} where its name goes, or set it to ''")
    if one_set:
        found = [Path(name) for name in glob.glob(str(place), recursive=True)]
        return _usable(found, suffixes) or _no_files(path, split, suffixes)
    if located(str(place)).is_file():
        return (place,)
    inside = "" if SPLIT in path else split
    for folder, start in [(place / inside, "")] + [(place, inside), (place / "data", inside)] * bool(inside):
        starts = tuple(start + sign for sign in "-._") if start else ("",)
        entries = folder.iterdir() if folder.is_dir() else ()
        if found := _usable([file for file in entries if file.name.startswith(starts)], suffixes):
            return found
    return _no_files(path, split, suffixes)


def _usable(files: list[Path], suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    kept = (file for file in files if file.name.endswith(suffixes) and not is_hidden(file.name) and file.is_file())
    return tuple(sorted(kept))


def _no_files(path: str, split: str, suffixes: tuple[str, ...]) -> tuple[Path, ...]:
    raise RearError(
        f"{path} holds no {suffixes[0]} files of the split {split!r}; put them in {path}/{split or ''}, "
        "or set the split to what their names begin with"
    )
