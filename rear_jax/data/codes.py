"""Code files: what a tokenizer made of an image set, written once and read in random order ever after.

A folder holds `header.json` and shards `codes-00000-of-00008.array_record`. Shard s of S covers the images
[s n/S, (s + 1) n/S), each in all its views. A record is little-endian uint16 [2 + N]: label, index of the view, the
N codes in raster order. Where there are more than 65,536 labels, such as numbers of captions, a label takes two places
of the record, the lower half first: [3 + N].

Records are stored one by one and uncompressed, because random codes hardly compress and a training step reads records
from all over the set. Each carries a checksum; one that cannot be read is replaced by the next one that can, always the
same, and counted.

The folder is local or mounted. `header.json` appears, under that name, when the last shard is complete.
"""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from rear_jax.data.codes_header import (
    HEADER,
    UNFINISHED_HEADER,
    CodesHeader,
    as_json,
    check_share,
    read_header,
    refuse_other_plan,
)
from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.atomic import atomic_file

log = logging.getLogger(__name__)

RECORD_DTYPE = np.dtype("<u2")
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access


def write_codes(
    directory: os.PathLike[str],
    header: CodesHeader,
    encode_range: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    progress: Callable[[int, int], None],
    process_index: int | None = None,
    process_count: int | None = None,
) -> None:
    """Writes a folder of codes, or what is still missing from it.

    A killed run is continued by calling this again: complete shards are kept, anything else is written afresh.
    Several processes on one file system share the work when each takes every `process_count`-th shard.

    Args:
      directory: made if it does not exist.
      header: the plan.
      encode_range: (start, stop) -> codes [m, N], labels [m] and view indices [m] of the images [start, stop), where
        m = (stop - start) A and the views of one image are neighbours. Called once per shard.
      progress: called after each shard with the images done so far and in all, of this process's share.
      process_index, process_count: this process and how many there are; by default as jax has them.

    Raises RearError: the folder was begun with another plan, or `encode_range` returned something out of range.
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = process_count or jax.process_count()
    directory = places.place(directory)
    directory.mkdir(parents=True, exist_ok=True)
    _claim(directory, header, process_index)
    mine = range(process_index, header.num_shards, process_count)
    total = sum(stop - start for start, stop in (header.image_ranges[shard] for shard in mine))
    done = 0
    for shard in mine:
        path = header.shard_path(directory, shard)
        start, stop = header.image_ranges[shard]
        if not _is_complete(path, header.shard_sizes[shard]):
            codes, labels, views = encode_range(start, stop)
            if len(codes) != header.shard_sizes[shard]:
                raise RearError(f"{path}: images {start} to {stop} gave {len(codes)} rows of codes; check num_images")
            write_shard(path, header, codes, labels, views)
        done += stop - start
        progress(done, total)
    if all(_is_complete(header.shard_path(directory, s), size) for s, size in enumerate(header.shard_sizes)):
        with contextlib.suppress(FileNotFoundError):  # finished before, or by another process
            (directory / UNFINISHED_HEADER).replace(directory / HEADER)


def write_shard(path: Path, header: CodesHeader, codes: np.ndarray, labels: np.ndarray, views: np.ndarray) -> None:
    """Writes one shard whole or not at all.

    Args:
      path: the file.
      header: gives N, K, A and the number of classes.
      codes: integers [m, N].
      labels: integers [m].
      views: integers [m], index of the augmentation's view: 0 to A - 1, again and again.

    Raises RearError: shapes disagree, a code or label is outside its range, or the views are out of order.
    """
    rows = len(codes)
    if codes.shape != (rows, header.codes_per_image) or labels.shape != (rows,) or views.shape != (rows,):
        raise RearError(
            f"{path}: codes {codes.shape}, labels {labels.shape}, views {views.shape}; "
            f"wanted [m, {header.codes_per_image}], [m], [m]"
        )
    for name, values, limit in (("code", codes, header.codebook_size), ("label", labels, header.num_classes)):
        if values.size and not (values.min() >= 0 and values.max() < limit):
            raise RearError(f"{path}: a {name} is outside [0, {limit}): found {values.min()} to {values.max()}")
    if not np.array_equal(views, np.arange(rows) % header.num_augmentations):
        raise RearError(f"{path}: views do not run 0 to {header.num_augmentations - 1} for each image in turn")
    halves = [labels >> 16 * column & 0xFFFF for column in range(header.label_columns)]
    records = np.concatenate([np.stack([*halves, views], axis=1), codes], axis=1).astype(RECORD_DTYPE)
    with atomic_file(path) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
            for record in records:
                writer.write(record.tobytes())
            writer.close()
        except RuntimeError as error:  # how array_record reports what the disk refuses
            reason = str(error).partition(";")[0]
            raise RearError(f"writing {path} failed ({reason}): free space there and run again.") from None


class Codes:
    """A complete folder of codes, read by record number. Made by `open_codes`.

    A record has P numbers before its N codes: P - 1 of the label, and the view.
    """

    def __init__(self, directory: Path, header: CodesHeader, *, in_memory: bool, max_corrupt_share: float):
        self.header = header
        self._max_corrupt_share = max_corrupt_share
        self._corrupt: set[int] = set()
        self._paths = [header.shard_path(directory, shard) for shard in range(header.num_shards)]
        self._bounds = np.cumsum([0, *header.shard_sizes])
        label = header.num_classes - 1
        labels = [label] if header.label_columns == 1 else [0xFFFF, label >> 16]
        largest = [*labels, header.num_augmentations - 1, *[header.codebook_size - 1] * header.codes_per_image]
        self._largest = np.array(largest).astype(RECORD_DTYPE)
        self._readers = [_open_shard(p, n) for p, n in zip(self._paths, header.shard_sizes, strict=True)]
        self._records = self._load() if in_memory else None

    def __len__(self) -> int:
        return self.header.num_records

    @property
    def num_corrupt(self) -> int:
        """Damaged records found so far, each counted once."""
        return len(self._corrupt)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Records by number, in the order asked for. The next readable one stands in for one that is damaged.

        Args:
          indices: integers [m] in [0, len(self)). Record i is view i % A of image i // A.

        Returns:
          {'codes': int32 [m, N], 'label': int32 [m], 'augmentation': int32 [m]}.

        Raises RearError: more records are damaged than may be; names the shard and the record in it.
        """
        records = self._fetch(indices) if self._records is None else self._records[indices]
        labels, columns = self._labels(records), self.header.label_columns
        views, codes = records[:, columns].astype(np.int32), records[:, columns + 1 :].astype(np.int32)
        return {"codes": codes, "label": labels.astype(np.int32), "augmentation": views}

    def class_counts(self) -> np.ndarray:
        """Records of each class, int64 [num_classes], from one pass over the disk."""
        counts = np.zeros(self.header.num_classes, np.int64)
        for shard in range(self.header.num_shards):
            counts += np.bincount(self._labels(self._read_shard(shard)), minlength=len(counts))
        return counts

    def _labels(self, records: np.ndarray) -> np.ndarray:
        """Labels of records, int64 [m]."""
        halves = records[:, : self.header.label_columns].astype(np.int64)
        return np.sum(halves << 16 * np.arange(halves.shape[1]), axis=1)

    def _fetch(self, indices: np.ndarray) -> np.ndarray:
        """Records from the disk, uint16 [m, P + N], asked for in the order in which they lie there."""
        order = np.argsort(indices)
        records = np.empty((len(indices), len(self._largest)), RECORD_DTYPE)
        try:
            records[order] = self._read_at(indices[order])
        except (RuntimeError, ValueError):
            records[order] = [self._readable(index) for index in indices[order].tolist()]
        return records

    def _read_at(self, indices: np.ndarray) -> np.ndarray:
        """Records from the disk, uint16 [m, P + N]; RuntimeError or ValueError where one of them is damaged.

        Each is a range of one: a range is read right here, where a list of positions goes to a pool of threads and
        takes four times as long for records this small.
        """
        shards, positions = self._places(indices)
        places = zip(shards.tolist(), positions.tolist(), strict=True)
        raw = [self._readers[shard].read(position, position + 1) for shard, position in places]
        return self._parse(list(itertools.chain.from_iterable(raw)), len(indices))

    def _readable(self, index: int) -> np.ndarray:
        """Record `index`, uint16 [P + N], or if it is damaged the next that is not; the first follows the last."""
        while True:
            try:
                return self._read_at(np.array([index]))[0]
            except (RuntimeError, ValueError) as error:
                self._count_corrupt(index, str(error).partition(";")[0])
                index = (index + 1) % len(self)

    def _count_corrupt(self, index: int, reason: str) -> None:
        """Names a damaged record in the log; raises RearError when there are more than may be."""
        if index in self._corrupt:
            return
        self._corrupt.add(index)
        (shard,), (position,) = self._places(np.array([index]))
        where = f"{self._paths[shard]}, record {position}: {reason}"
        if len(self._corrupt) > self._max_corrupt_share * len(self):
            raise RearError(
                f"{where}; {len(self._corrupt)} of {len(self)} records cannot be read so far, codes.max_corrupt_share "
                f"= {self._max_corrupt_share} allows no more: delete this shard and run the job that wrote it again"
            )
        log.warning("%s; the next readable record takes its place", where)

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard of each record and its position there."""
        shards = np.searchsorted(self._bounds, indices, side="right") - 1
        return shards, indices - self._bounds[shards]

    def _load(self) -> np.ndarray:
        """All records, uint16 [num_records, P + N], by sequential reads."""
        records = np.empty((len(self), len(self._largest)), RECORD_DTYPE)
        for shard in range(self.header.num_shards):
            start, stop = self._bounds[shard : shard + 2]
            records[start:stop] = self._read_shard(shard)
        return records

    def _read_shard(self, shard: int) -> np.ndarray:
        """All records of a shard, uint16 [m, P + N]."""
        count = self.header.shard_sizes[shard]
        try:
            return self._parse(ArrayRecordReader(str(self._paths[shard])).read_all(), count)
        except (RuntimeError, ValueError):
            return self._fetch(np.arange(*self._bounds[shard : shard + 2]))

    def _parse(self, raw: list[bytes], count: int) -> np.ndarray:
        """Bytes of so many records as uint16 [count, P + N]; ValueError where one of them cannot be right."""
        if len(raw) != count or any(len(record) != self._largest.nbytes for record in raw):
            raise ValueError(f"missing, or not {self._largest.nbytes} bytes long")
        records = np.frombuffer(b"".join(raw), RECORD_DTYPE).reshape(len(raw), -1)
        if (records > self._largest).any():
            raise ValueError("a label, view or code is out of range")
        return records


def open_codes(directory: os.PathLike[str], *, in_memory: bool = False, max_corrupt_share: float = 0.0) -> Codes:
    """Opens a complete folder of codes.

    Args:
      directory: the folder.
      in_memory: read everything now (2 (2 + N) bytes per record; 6.6 GB for ImageNet in ten crops at N = 256). Random
        reads then cost next to nothing, and a slow or remote disk is only read in sequence.
      max_corrupt_share: in [0, 1), of the records may be damaged: others stand in for them. 0 = none may.

    Raises RearError: the folder is not complete, a shard is missing or damaged, or the share is no such number.
    """
    directory = places.place(directory)
    check_share(max_corrupt_share)
    if not (directory / HEADER).is_file():
        begun = (directory / UNFINISHED_HEADER).is_file()
        state = "is not finished: continue" if begun else "holds no codes: write them with"
        raise RearError(f"{directory} {state} the job `tokenize` or `import`")
    header = read_header(directory / HEADER)
    return Codes(directory, header, in_memory=in_memory, max_corrupt_share=max_corrupt_share)


def _claim(directory: Path, header: CodesHeader, process_index: int) -> None:
    """Records the plan in the folder, or makes sure that it is the one already there."""
    if not refuse_other_plan(directory, header):
        with atomic_file(directory / UNFINISHED_HEADER, writer=process_index) as temporary:
            temporary.write_text(json.dumps(as_json(header), indent=2) + "\n")


def _is_complete(path: Path, num_records: int) -> bool:
    return path.is_file() and ArrayRecordReader(str(path), READER_OPTIONS).num_records() == num_records


def _open_shard(path: Path, num_records: int) -> ArrayRecordReader:
    if not path.is_file():
        raise RearError(f"{path} is missing; run the job that wrote it (`tokenize`, `import`) again to restore it")
    reader = ArrayRecordReader(str(path), READER_OPTIONS)
    if reader.num_records() != num_records:
        raise RearError(
            f"{path} is damaged: {reader.num_records()} records can be read, not {num_records}; "
            "run the job that wrote it (`tokenize`, `import`) again to restore it"
        )
    return reader
