"""Features of captions as `--job=caption` writes them: once, in shards of bounded size, read by number.

A folder holds `header.json` and for each shard two arrays: `features-00000-of-00008.npy` [R, D], the features of its
captions one after the other, without padding; and `counts-00000-of-00008.npy` [n], how many each of them has. NumPy
files have no bfloat16: the header says so, and the array holds its bits as uint16. Shard s of S covers captions
[s n/S, (s + 1) n/S). The counts are written last: a shard is whole when they are there.

The folder is local or mounted. `header.json` appears, under that name, when the last shard is complete.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.runtime.array_files import map_npy, read_npy, write_npy
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.files import open_regular

HEADER = "header.json"
UNFINISHED_HEADER = "header.json.partial"
CAPTIONS_OF_SHARD = 4096  # at most: of T5-XL, and of 120 tokens each, 2 GB
REMEDY = "run --job=caption again to restore it"
STORED = {"bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class CaptionsHeader:
    """What a folder of features holds.

    Attributes:
      num_captions: n.
      length: features of a caption at most.
      dim: D.
      dtype: of the features, a key of STORED.
      encoder: fingerprint of the text encoder, with its vocabulary.
      captions: fingerprint of the captions.
      source, split: what they are from.
    """

    num_captions: int
    length: int
    dim: int
    dtype: str
    encoder: str
    captions: str
    source: str
    split: str

    @property
    def num_shards(self) -> int:
        """S."""
        return -(-self.num_captions // CAPTIONS_OF_SHARD)

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """First caption of each shard, and n."""
        return np.arange(self.num_shards + 1) * self.num_captions // self.num_shards

    def shard(self, folder: Path, number: int) -> tuple[Path, Path]:
        """The files of features and of counts of a shard."""
        name = f"{number:05d}-of-{self.num_shards:05d}.npy"
        return folder / f"features-{name}", folder / f"counts-{name}"


class Rows(NamedTuple):
    """Features of some captions: [m, T, D] and a mask [m, T] of those that are there, wherever they stand in T."""

    features: np.ndarray
    mask: np.ndarray


def write_captions(
    folder: Path,
    header: CaptionsHeader,
    encode_range: Callable[[int, int], Iterable[Rows]],
    *,
    progress: Callable[[int], None],
    process_index: int = 0,
    process_count: int = 1,
) -> None:
    """Writes a folder of features, or what is still missing of it; several processes take every P-th shard each.

    Args:
      folder: made if it does not exist.
      header: the plan.
      encode_range: (start, stop) -> features of these captions, some at a time; called once a shard.
      progress: called after each shard with the captions done so far, of this process's share.
      process_index, process_count: which process this is, of how many.

    Raises RearError: the folder was begun by another plan, or features are not finite or of another width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not refuse_other_plan(folder, header) and process_index == 0:
        write_json(folder / UNFINISHED_HEADER, dataclasses.asdict(header))
    done = 0
    for number in range(process_index, header.num_shards, process_count):
        start, stop = header.bounds[number : number + 2].tolist()
        if not _is_complete(folder, header, number):
            _write_shard(folder, header, number, encode_range(start, stop))
            if not _is_complete(folder, header, number):
                raise RearError(f"captions {start} to {stop} of {header.source} gave features of other sizes.")
        done += stop - start
        progress(done)
    if all(_is_complete(folder, header, number) for number in range(header.num_shards)):
        with contextlib.suppress(FileNotFoundError):  # finished before, or by another process
            (folder / UNFINISHED_HEADER).replace(folder / HEADER)


def refuse_other_plan(folder: Path, header: CaptionsHeader, *, but: tuple[str, ...] = ()) -> bool:
    """Whether the folder was begun, by this plan; entries named in `but` may differ.

    Raises RearError: it was begun by another plan.
    """
    for path in (folder / HEADER, folder / UNFINISHED_HEADER):
        if path.is_file():
            stored = dataclasses.asdict(read_header(path))
            for name, value in dataclasses.asdict(header).items():
                if stored[name] != value and name not in but:
                    raise RearError(
                        f"{folder} was begun with {name} {stored[name]!r}, not {value!r}; "
                        "name another folder in config.captions_from or delete this one."
                    )
            return True
    return False


def read_header(path: Path) -> CaptionsHeader:
    """The header in a file; raises RearError where it is damaged."""
    try:
        with open_regular(path, f"{path} is no file: delete its folder and run --job=caption again.") as file:
            header = CaptionsHeader(**json.loads(file.read()))
        sizes = header.num_captions, header.length, header.dim
        if header.dtype not in STORED or not all(type(size) is int and 1 <= size < 1 << 31 for size in sizes):
            raise ValueError(f"dtype {header.dtype!r}, sizes {sizes}")
        if not all(type(name) is str for name in (header.encoder, header.captions, header.source, header.split)):
            raise ValueError("a name in it is no text")
    except (ValueError, TypeError, RecursionError) as error:
        raise RearError(f"{path} is damaged ({error}): delete its folder and run --job=caption again.") from None
    return header


class CaptionShards:
    """A complete folder of features; those that are asked for are read, by memory mapping."""

    def __init__(self, folder: Path, *, length: int, dim: int):
        """Opens it for a generator with so many positions for a caption, and for features of this width.

        Raises RearError: it is not complete or damaged, or has other sizes.
        """
        if not (folder / HEADER).is_file():
            raise RearError(f"{folder} is not finished: continue the job `caption`.")
        self.folder, self.header, self._length = folder, read_header(folder / HEADER), length
        if self.header.dim != dim or self.header.length > length:
            raise RearError(
                f"{folder}: features are [at most {self.header.length}, {self.header.dim}], this generator takes "
                f"[at most {length}, {dim}]: encode the captions by the text encoder that it was trained with."
            )
        for number in range(self.header.num_shards):
            if not _is_complete(folder, self.header, number):
                features, _ = self.header.shard(folder, number)
                raise RearError(f"{features} is missing or damaged: run --job=caption again to restore it.")
        self._shard = functools.lru_cache(maxsize=64)(self._open)

    def __len__(self) -> int:
        return self.header.num_captions

    def __getitem__(self, numbers: np.ndarray | slice) -> Captions:
        """Some captions by number: features [m, length, dim] float32 at the right end, zero before; mask [m, length].

        Raises RearError: there are not so many captions.
        """
        if isinstance(numbers, slice):
            numbers = np.arange(len(self))[numbers]
        numbers = np.asarray(numbers)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise RearError(f"{self.folder} has {len(self)} captions: none has the number {int(numbers.max())}.")
        features = np.zeros((len(numbers), self._length, self.header.dim), np.float32)
        mask = np.zeros((len(numbers), self._length), bool)
        for row, number in enumerate(numbers.tolist()):
            found = self._features(number)
            features[row, self._length - len(found) :] = found
            mask[row, self._length - len(found) :] = True
        return Captions(features, mask)

    def _features(self, number: int) -> np.ndarray:
        """[T, D] of one caption."""
        shard = int(np.searchsorted(self.header.bounds, number, side="right")) - 1
        features, ends = self._shard(shard)
        place = number - self.header.bounds[shard]
        found = features[ends[place] : ends[place + 1]]
        return found.view(ml_dtypes.bfloat16) if self.header.dtype == "bfloat16" else found

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of a shard, memory-mapped, and where each caption's begin."""
        features, counts = self.header.shard(self.folder, number)
        return map_npy(features, REMEDY), np.concatenate([[0], np.cumsum(read_npy(counts, REMEDY))])


def _write_shard(folder: Path, header: CaptionsHeader, number: int, batches: Iterable[Rows]) -> None:
    start, stop = header.bounds[number : number + 2].tolist()
    features, counts = [], []
    for batch in batches:
        there = batch.features[batch.mask]
        if not np.isfinite(there).all():
            raise RearError(f"captions {start} to {stop}: features are not finite; try config.text.dtype = 'float32'.")
        is_narrow = header.dtype == "bfloat16"
        features.append(there.astype(ml_dtypes.bfloat16).view(np.uint16) if is_narrow else there.astype(np.float32))
        counts.append(batch.mask.sum(axis=1, dtype=np.int32))
    arrays = np.concatenate(features), np.concatenate(counts)
    for file, array in zip(header.shard(folder, number), arrays, strict=True):
        write_npy(file, array)


def _is_complete(folder: Path, header: CaptionsHeader, number: int) -> bool:
    """Whether both files of a shard are there, and of the sizes that they say of each other."""
    try:
        features, counts = (map_npy(file, REMEDY) for file in header.shard(folder, number))
    except RearError:
        return False
    start, stop = header.bounds[number : number + 2].tolist()
    wanted = (int(np.sum(counts)), header.dim)
    of_sizes = counts.shape == (stop - start,) and features.shape == wanted and features.dtype == STORED[header.dtype]
    return of_sizes and bool((counts >= 0).all() and (counts <= header.length).all())
