"""Checkpoints that model hubs hand out in several files, beside an index of which tensor lies in which file.

The index, `model.safetensors.index.json` or `pytorch_model.bin.index.json`, is JSON: its `weight_map` gives the name of
a file in the same folder for the key of each tensor.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.files import open_regular
from rear_jax.weights import layout, sections
from rear_jax.weights.layout import OpenTensors
from rear_jax.weights.torch_files import read_tensors
from rear_jax.weights.views import View

NAMES = (  # what a folder's weights are called, the first one that is there counts
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before all keys
ONE_OF_SEVERAL = r".*-\d+-of-(\d+)\.(safetensors|bin)"  # the name of a file beside an index
FILE_NAME = r"[^/\\]{1,60}"  # of no other folder, and short enough for every file system


def open_weights(path: str | Path) -> Mapping[str, np.ndarray]:
    """Opens the tensors of a published network, in one file or in several.

    Args:
      path: a checkpoint file, an index, or the folder that has either under a name of `NAMES`.

    Returns:
      State-dict key -> array as `read_tensors` gives it, read at each look-up. Prefixes of `WRAPPERS` that all keys
      have are left out.

    Raises RearError: there is no such file, the index is damaged or names a file outside its folder, or a shard is
      missing, damaged or without a tensor that the index promises.
    """
    tensors = open_as_written(path)
    return unwrapped(tensors, WRAPPERS) or tensors


def open_as_written(path: str | Path, section: str = "") -> Mapping[str, np.ndarray]:
    """The same of a section as of `read_tensors`, with all prefixes but that of the section."""
    path = located(path)
    if (one := re.fullmatch(ONE_OF_SEVERAL, path.name)) and int(one[1]) > 1:
        raise RearError(f"{path} is one of the {int(one[1])} files of a network: name its folder, or the index there.")
    if not is_index(path):
        return read_tensors(path, section)
    tensors = _Shards(path)
    return View(tensors, section, sections.under(tensors, section, path)) if section else tensors


def unwrapped(tensors: Mapping[str, np.ndarray], wrappers: Collection[str]) -> View | None:
    """The tensors without the prefixes, one or several after the other, that all keys have; None = there is none."""
    return under(tensors, "", wrappers)


def under(tensors: Mapping[str, np.ndarray], start: str, wrappers: Collection[str]) -> View | None:
    """The tensors whose keys begin with `start`, without it and what else all of these have; None = nothing is cut."""
    keys, prefix = [key for key in tensors if key.startswith(start)], start
    first = next(iter(keys), "")
    while found := next((one for one in wrappers if first.startswith(prefix + one)), ""):
        if not all(key.startswith(prefix + found) for key in keys):
            break
        prefix += found
    return View(tensors, prefix, {key.removeprefix(prefix): key for key in keys}) if prefix and keys else None


def weights_in(folder: Path) -> Path | None:
    """The checkpoint, or the index, of a folder: the first one of `NAMES`, else the only index of another name."""
    found = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    others = [] if found else sorted(folder.glob("*.index.json"))
    return others[0] if len(others) == 1 else found


def located(path: str | Path) -> Path:
    """The file that `open_weights` opens first: a checkpoint, or an index; raises RearError for a folder without."""
    path = places.place(path)
    if not path.is_dir():
        return path
    if (found := weights_in(path)) is None:
        raise RearError(f"{path} has no weights: a folder must hold one of {', '.join(NAMES)}.")
    return found


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards."""
    return path.suffix == ".json" and path.is_file()


def files_of_index(path: Path) -> list[str]:
    """Names of the files that an index speaks of, which are beside it; raises RearError where it is damaged."""
    return sorted(set(_read_index(path).values()))


def keys_of_files(path: str | Path) -> dict[str, list[str]]:
    """Name of each file with weights -> keys of the tensors in it that count; see `open_weights`."""
    path, found = located(path), {}
    for key, name in (_read_index(path) if is_index(path) else dict.fromkeys(read_tensors(path), path.name)).items():
        found.setdefault(name, []).append(key)
    return found


def require_bytes(path: str | Path, count: int) -> None:
    """Raises RearError where so many numbers cannot be in the files: a damaged one may repeat its own without end.

    Args:
      path: as of `open_weights`.
      count: numbers of the network that is about to be read, each of a byte at least.
    """
    path = places.place(path)
    several = path.is_dir() or path.suffix == ".json"
    files = (path if path.is_dir() else path.parent).iterdir() if several else [path]
    if count > sum(places.size(file) for file in files if file.is_file()):
        raise RearError(f"{path} is smaller than the weights that it promises: it is damaged, fetch it again.")


class _Shards(OpenTensors):
    """The tensors that an index lists, in all its files."""

    def __init__(self, index: Path):
        self._file_of = _read_index(index)
        self._files = {}
        for name in files_of_index(index):
            if not (index.parent / name).is_file():
                raise RearError(f"{index} names the file {name}, which is not beside it: fetch all files of the model.")
            self._files[name] = read_tensors(index.parent / name)
        for key, name in self._file_of.items():
            if key not in self._files[name]:
                raise RearError(f"{index.parent / name} has no tensor {key}, but {index} says so: fetch both again.")

    def __getitem__(self, key: str) -> np.ndarray:
        return self._files[self._file_of[key]][key]

    def outline(self) -> dict[str, np.ndarray]:
        outlines = {name: layout.outline(tensors) for name, tensors in self._files.items()}
        return {key: outlines[name][key] for key, name in self._file_of.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _read_index(path: Path) -> dict[str, str]:
    """The `weight_map`: key of a tensor -> name of the file that has it.

    A name must be that of a file beside the index. The file itself may be a link, as in the caches of model hubs.
    """
    try:
        with open_regular(path, f"There is no index {path}.") as file:
            found = json.loads(file.read())["weight_map"]
        if not (isinstance(found, dict) and found and all(isinstance(name, str) for name in found.values())):
            raise ValueError("its weight_map is no table of file names")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise RearError(f"{path} is not an index of shards ({error!r}): fetch it again.") from error
    for name in found.values():
        if name in ("", ".", "..") or not re.fullmatch(FILE_NAME, name) or not name.isprintable():
            raise RearError(f"{path} names the file {name[:99]!r}, which is not beside it: refused; fetch it again.")
    return found
