"""Rows of a metadata.jsonl or metadata.csv: where each lies in the file, and the record that it holds."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from rear_jax.data.sources.texts import json_record
from rear_jax.errors import RearError


class Row(NamedTuple):
    """A row as it stands in the file, from byte `start` on."""

    start: int
    raw: bytes


class Metadata(Protocol):
    """A file of records."""

    path: Path

    def rows(self) -> Iterator[Row]:
        """Rows that are not blank, in order; raises RearError where the file has no form."""
        ...

    def record(self, raw: bytes) -> dict[str, Any]:
        """What a row says; raises ValueError where that cannot be read."""
        ...


class JsonLines:
    """A file with one JSON object a line."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> Iterator[Row]:
        """See `Metadata`."""
        start = 0
        with self.path.open("rb") as file:
            for raw in file:
                if raw.strip():
                    yield Row(start, raw)
                start += len(raw)

    def record(self, raw: bytes) -> dict[str, Any]:
        """See `Metadata`."""
        return json_record(raw)


class Csv:
    """A file with the names of its columns in the first row; a cell in quotes may hold commas and ends of lines."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            first = next(self._rows(file), Row(0, b""))
        self.columns = self._cells(first.raw.removeprefix(b"\xef\xbb\xbf"))  # the mark of UTF-8
        self._end_of_header = first.start + len(first.raw)

    def rows(self) -> Iterator[Row]:
        """See `Metadata`."""
        with self.path.open("rb") as file:
            file.seek(self._end_of_header)
            yield from self._rows(file)

    def record(self, raw: bytes) -> dict[str, Any]:
        """See `Metadata`; cells that are missing at the end are left out."""
        return dict(zip(self.columns, self._cells(raw), strict=False))

    def _rows(self, file: BinaryIO) -> Iterator[Row]:
        start, lines = file.tell(), []

        def texts() -> Iterator[str]:
            for line in file:
                lines.append(line)
                yield _text(line)

        try:
            for cells in csv.reader(texts(), strict=True):
                raw = b"".join(lines)
                lines.clear()
                if cells:
                    yield Row(start, raw)
                start += len(raw)
        except csv.Error as error:
            raise RearError(f"{self.path} is no CSV from byte {start} on ({error}); correct it") from None

    def _cells(self, raw: bytes) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(_text(raw), newline=""), strict=True), [])
        except csv.Error as error:
            raise ValueError(f"no CSV ({error})") from None


def _text(raw: bytes) -> str:
    """Bytes that are no UTF-8 stay in the text as marks, so that they spoil one cell alone."""
    return raw.decode("utf-8", "surrogateescape")
