"""Cells of .parquet files by row: a row group is read whole, and the last few that were read are kept.

Reading one image costs the reading of its group, unless that is kept: in shuffled order 10 to 15 ms in groups of 100
images of 60 kB, 60 to 220 ms in groups of 1000 (one core, local disk). Hugging Face writes groups of 100.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from rear_jax.errors import RearError

BYTES_KEPT = 256 * 2**20  # of the groups that were read last; the last one is kept whatever its size


class RowGroups:
    """The rows of some files, one after the other."""

    def __init__(self, files: Sequence[Path], group_file: np.ndarray, group_rows: np.ndarray):
        """`group_file` [G]: in which of the files each group is; `group_rows` [G]: how many rows it has."""
        self.files = files
        self._file, self._starts = group_file, np.cumsum([0, *group_rows])
        self._number = np.arange(len(group_file)) - np.searchsorted(group_file, group_file)  # in its file
        self._kept: OrderedDict[tuple[int, str], Future] = OrderedDict()
        self._lock = threading.Lock()

    def place(self, row: int) -> tuple[Path, int]:
        """The file of a row, and its number in that file."""
        group = self._group(row)
        first = int(self._starts[np.searchsorted(self._file, self._file[group])])
        return self.files[self._file[group]], row - first

    def cell(self, row: int, column: str) -> bytes | None:
        """A cell of a column of bytes or text, None where it is empty; raises RearError where it cannot be read."""
        group = self._group(row)
        values, number = self._column(group, column), row - int(self._starts[group])
        if number >= len(values):
            raise RearError(f"{self.place(row)[0]} has fewer rows than when it was indexed; start the run again")
        value = values[number].as_buffer()
        return None if value is None else value.to_pybytes()

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _column(self, group: int, column: str) -> Any:
        """A column of a group as a pyarrow array, read by one thread while others that want it wait."""
        with self._lock:
            reading = (group, column) not in self._kept
            future = self._kept.setdefault((group, column), Future())
            self._kept.move_to_end((group, column))
        if reading:
            try:
                path, number = self.files[self._file[group]], int(self._number[group])
                future.set_result(read_column(path, column, number))
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._kept.pop((group, column), None)  # it may be readable next time
            self._forget_oldest()
        return future.result()

    def _forget_oldest(self) -> None:
        with self._lock:
            sizes = {key: _size(future) for key, future in self._kept.items()}
            total = sum(sizes.values())
            for key in list(sizes)[:-1]:
                if sizes[key] and total > BYTES_KEPT:
                    total -= sizes[key]
                    del self._kept[key]


def read_column(path: Path, column: str, group: int) -> Any:
    """A column of a row group as a pyarrow array; `a.b` is the field b of the column a.

    Raises RearError: the file is damaged.
    """
    import pyarrow as pa  # here, because other sources need none of it
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            (values,) = file.read_row_group(group, columns=[column], use_threads=False).columns
        while pa.types.is_struct(values.type):  # with the one field that was asked for
            values = pa.chunked_array([chunk.field(0) for chunk in values.chunks], values.type.field(0).type)
        if not pa.types.is_integer(values.type):
            values = values.cast(pa.large_binary())
        return values.combine_chunks()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RearError(f"{path}: row group {group} cannot be read ({reason}); copy the file again") from None


def _size(future: Future) -> int:
    """Bytes that a kept column takes; 0 while it is read, or where that failed."""
    return future.result().nbytes if future.done() and future.exception() is None else 0
