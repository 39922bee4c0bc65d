"""Codes that others have computed and published, as a source that `codes.write_codes` can write from.

Three formats, told apart by what the path is:

- a `.jsonl` file, as RAR's: a line {"class_id": 7, "tokens": [N codes]} for each view of each image. Which views belong
  to one image is not said, so every line counts as an image with one view; blank lines hold none. It is read piece by
  piece, and what stays in memory are the places where lines begin, 8 bytes each.
- a folder, as LlamaGen's: `imagenet256_codes/<i>.npy` [1, A, N] with the A views of image i, and
  `imagenet256_labels/<i>.npy` [1].
- an `.npz` file, as AliTok's: codes [n, N] or [n, A, N] and labels [n]. The arrays are loaded whole.

Whatever does not fit the tokenizer or the number of classes is refused, and named by its line or file.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.array_files import ArrayArchive, open_npz, read_npy

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes [m, N], labels [m] and view indices [m], int32
CODES_NAMES = ("codes", "tokens", "token_ids")
LABELS_NAMES = ("labels", "label", "class_id")
SHORTEST_LINE = '{"class_id":0,"tokens":[]}'  # what is shorter may be blank
SCAN_BYTES = 2**24  # read at once when looking for line ends
LINES_AT_ONCE = 1000  # parsed at once
REMEDY = "fetch it again"
DIGITS = b"0123456789"
_ONLY_DIGITS = bytes(byte if byte in DIGITS else ord(" ") for byte in range(256))  # for bytes.translate


@dataclasses.dataclass(frozen=True)
class Limits:
    """What codes must fit.

    Attributes:
      codes_per_image: N of the tokenizer.
      codebook_size: K of the tokenizer.
      num_classes: labels are in [0, num_classes).
    """

    codes_per_image: int
    codebook_size: int
    num_classes: int

    def check(self, codes: np.ndarray, labels: np.ndarray, where: Callable[[int], str]) -> None:
        """Raises RearError if codes [m, ..., N] or labels [m] do not fit; `where` names the m-th of them."""
        for what, values in (("codes", codes), ("labels", labels)):
            if not np.issubdtype(values.dtype, np.integer):
                raise RearError(f"{where(0)}: {what} are {values.dtype}, not integers")
        if codes.shape[-1] != self.codes_per_image:
            count = f"{codes.shape[-1]} codes an image, the tokenizer makes {self.codes_per_image}"
            raise RearError(f"{where(0)}: {count}; give the config and the tokenizer that these codes were made with")
        for what, values, limit in (("code", codes, self.codebook_size), ("label", labels, self.num_classes)):
            if values.min() < 0 or values.max() >= limit:
                rows = values.reshape(len(values), -1)
                worst = int(np.argmax(((rows < 0) | (rows >= limit)).any(axis=1)))
                found = f"{rows[worst].min()} to {rows[worst].max()}"
                raise RearError(f"{where(worst)}: a {what} is outside [0, {limit}): found {found}")


class ImportedCodes(Protocol):
    """A published set of codes.

    Attributes:
      description: its format, and its size where that is one number: tells it from others of the same name.
      num_images: n.
      num_views: A, views of each image.
    """

    description: str
    num_images: int
    num_views: int

    def read(self, start: int, stop: int) -> Rows:
        """The images [start, stop) in all their views, those of one image side by side: m = (stop - start) A rows.

        Raises RearError: one of them is damaged or does not fit; named by its line or file.
        """


def open_import(path: Path, limits: Limits) -> ImportedCodes:
    """Opens a published set of codes.

    Raises RearError: there is nothing at `path`, or it is in none of the three formats.
    """
    return _format_of(path)(path, limits)


def check_import(path: Path, limits: Limits) -> None:
    """Raises RearError where the first lines, files or headers of a published set of codes tell that it is none."""
    _format_of(path).check(path, limits)


def _format_of(path: Path) -> "type[JsonLines | NpyFolder | NpzFile]":
    if not path.exists():
        raise RearError(f"{path} does not exist: mend config.import_codes.source.")
    if path.is_dir():
        if places.is_bucket(path):
            raise RearError(f"{path} is a folder in a bucket, two objects an image: copy it to this machine.")
        return NpyFolder
    formats = {".jsonl": JsonLines, ".npz": NpzFile}
    if path.suffix not in formats or not path.is_file():
        raise RearError(f"{path} is neither a .jsonl file (RAR), nor a folder (LlamaGen), nor an .npz file (AliTok).")
    return formats[path.suffix]


class JsonLines:
    """RAR's file, one JSON object a line."""

    num_views = 1

    def __init__(self, path: Path, limits: Limits):
        self._path, self._limits = path, limits
        line, codes, label = self._first(path, limits)
        self._bounds = line_bounds(path)
        self._numbers = filled_lines(path, self._bounds)
        self.description = f"RAR's lines, {self._bounds[-1]} bytes"
        self.num_images = len(self._numbers)
        plain = np.array_equal(_numbers_in(line), [label, *codes])  # no other numbers, and in this order
        self._frame = line.translate(None, DIGITS) + b"\n" if plain else b""

    @classmethod
    def check(cls, path: Path, limits: Limits) -> None:
        """Looks at the first line alone."""
        _, codes, label = cls._first(path, limits)
        limits.check(codes[None], label[None], lambda _: f"{path}, line 1")

    @staticmethod
    def _first(path: Path, limits: Limits) -> tuple[bytes, np.ndarray, np.ndarray]:
        """The first line, its codes [N] and its label []."""
        with path.open("rb") as file:
            number, line = next(((i, line) for i, line in enumerate(file, 1) if line.strip()), (0, b""))
        if not line:
            raise RearError(f"{path} is empty; fetch it again.")
        line = line.removesuffix(b"\n")
        return line, *_row(path, line, number, limits.codes_per_image)

    def read(self, start: int, stop: int) -> Rows:
        codes = np.empty((stop - start, self._limits.codes_per_image), np.int32)
        labels = np.empty(stop - start, np.int32)
        with self._path.open("rb") as file:
            for first in range(start, stop, LINES_AT_ONCE):
                last = min(first + LINES_AT_ONCE, stop)
                numbers = self._numbers[first:last]
                found = self._parse(self._text(file, numbers), numbers)
                self._limits.check(*found, where=lambda row, n=numbers: f"{self._path}, line {n[row]}")
                there = slice(first - start, last - start)
                codes[there], labels[there] = found
        return codes, labels, np.zeros(stop - start, np.int32)

    def _text(self, file: BinaryIO, numbers: Sequence[int]) -> bytes:
        """The lines with these numbers, without the blank ones between them."""
        start, stop = self._bounds[numbers[0] - 1], self._bounds[numbers[-1]]
        file.seek(start)
        text = file.read(stop - start).removesuffix(b"\n")
        if numbers[-1] - numbers[0] + 1 == len(numbers):
            return text
        return b"\n".join(line for line in text.split(b"\n") if line.strip())

    def _parse(self, text: bytes, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Codes [m, N] and labels [m] of the m lines with these numbers, which `text` holds.

        Lines that differ from the file's first one in their digits alone do not need the JSON parser, which takes four
        times as long.
        """
        count, wanted = len(numbers), self._limits.codes_per_image
        if self._frame and text.translate(None, DIGITS) + b"\n" == self._frame * count:
            values = _numbers_in(text)
            if values.size == count * (1 + wanted):
                table = values.reshape(count, -1)
                return table[:, 1:], table[:, 0]
        lines = text.split(b"\n")
        if len(lines) != count:
            raise RearError(f"{self._path} has changed since it was opened; run the job again.")
        rows = [_row(self._path, line, number, wanted) for number, line in zip(numbers, lines, strict=True)]
        codes, labels = zip(*rows, strict=True)
        return np.stack(codes), np.array(labels)


def _row(path: Path, line: bytes, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [count] and label [] of a line of a file, by the JSON parser."""
    try:
        row = json.loads(line)
        codes, label = np.array(row["tokens"]), np.array(row["class_id"])
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        wanted = 'wanted {"class_id": ..., "tokens": [...]}'
        raise RearError(f"{path}, line {number}: {wanted}, this cannot be read ({error!r})") from None
    if not codes.dtype.kind == label.dtype.kind == "i" or codes.shape != (count,) or label.shape:
        raise RearError(
            f"{path}, line {number}: wanted {count} integers as tokens and one as class_id, found "
            f"{codes.shape} {codes.dtype} and {label.shape} {label.dtype}; is the tokenizer the right one?"
        )
    return codes, label


def _numbers_in(text: bytes) -> np.ndarray:
    """All runs of digits in a text as numbers, int64; those beyond its range at the end of it."""
    return np.fromstring(text.translate(_ONLY_DIGITS), np.int64, sep=" ")


def line_bounds(path: Path) -> np.ndarray:
    """Where each line of a file begins and the last one ends, int64 [lines + 1]; the last may lack its newline."""
    bounds, done = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(SCAN_BYTES):
            bounds.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + done + 1)
            done += len(block)
    found = np.concatenate(bounds)
    return found if found[-1] == done else np.append(found, done)


def filled_lines(path: Path, bounds: np.ndarray) -> Sequence[int]:
    """Numbers, from 1 on, of the lines that are not blank; `bounds` are those of `line_bounds`."""
    short = np.flatnonzero(np.diff(bounds) < len(SHORTEST_LINE))
    with path.open("rb") as file:
        blank = [index for index in short.tolist() if not _line(file, bounds[index : index + 2]).strip()]
    lines = range(1, len(bounds))
    return np.delete(np.array(lines), blank) if blank else lines


def _line(file: BinaryIO, bounds: np.ndarray) -> bytes:
    file.seek(bounds[0])
    return file.read(bounds[1] - bounds[0])


class NpyFolder:
    """LlamaGen's folder: two files an image."""

    description = "LlamaGen's folder"

    def __init__(self, path: Path, limits: Limits):
        self._codes, self._labels, self._limits = _folder(path, "_codes"), _folder(path, "_labels"), limits
        (codes, self._code_files), (labels, self._label_files) = _numbered(self._codes), _numbered(self._labels)
        lonely = np.setxor1d(codes, labels)
        if len(lonely):
            raise RearError(f"{path}: {lonely[0]}.npy is in only one of its two folders; fetch the other or delete it.")
        self.num_images = len(codes)
        first = self._load(self._codes / self._code_files[0], (1, None, limits.codes_per_image))
        self.num_views = first.shape[1]

    @classmethod
    def check(cls, path: Path, limits: Limits) -> None:
        """Looks at the names of all files and at the first image."""
        cls(path, limits).read(0, 1)

    def read(self, start: int, stop: int) -> Rows:
        codes = np.empty((stop - start, self.num_views, self._limits.codes_per_image), np.int32)
        labels = np.empty(stop - start, np.int32)
        pairs = zip(self._code_files[start:stop], self._label_files[start:stop], strict=True)
        for row, (code_file, label_file) in enumerate(pairs):
            path = self._codes / code_file
            image = self._load(path, (1, self.num_views, self._limits.codes_per_image))
            label = self._load(self._labels / label_file, (1,))
            self._limits.check(image, label, lambda _, path=path: f"{path} (or its label)")
            codes[row], labels[row] = image[0], label[0]
        return _by_view(codes, labels)

    def _load(self, path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
        """One small array; None in `shape` is any size."""
        array = read_npy(path, REMEDY)
        wanted = tuple(have if want is None else want for have, want in zip(array.shape, shape, strict=False))
        if array.shape != wanted or len(wanted) != len(shape) or not array.size:
            told = ", ".join("A" if size is None else str(size) for size in shape)
            raise RearError(f"{path} has the shape {array.shape}, wanted [{told}]; is the tokenizer the right one?")
        return array


def _folder(path: Path, ending: str) -> Path:
    found = sorted(place.name for place in path.iterdir() if place.is_dir() and place.name.endswith(ending))
    if len(found) != 1:
        raise RearError(f"{path} must hold one folder *{ending}, as LlamaGen's do; found {', '.join(found) or 'none'}.")
    return path / found[0]


def _numbered(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """i of all files `<i>.npy` in rising order, int64, and their names; zeros may precede a number."""
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(".npy") and not entry.name.startswith(".")]
        names = np.array([entry.name for entry in files if entry.is_file()])
    if len(names) < len(files):
        raise RearError(f"{folder}: a .npy in it is no file; move it elsewhere.")
    if not len(names):
        raise RearError(f"{folder} holds no .npy files; fetch them again.")
    try:
        numbers = np.array([int(name.removesuffix(".npy")) for name in names.tolist()], np.int64)
    except (ValueError, OverflowError) as error:
        raise RearError(f"{folder}: a file is not called by a number ({error}); move it elsewhere.") from None
    order = np.argsort(numbers)
    numbers, names = numbers[order], names[order]
    if len(twice := np.flatnonzero(np.diff(numbers) == 0)):
        raise RearError(f"{folder}: {names[twice[0]]} and {names[twice[0] + 1]} are the same number; remove one.")
    return numbers, names


class NpzFile:
    """AliTok's file: all codes and labels in one archive."""

    def __init__(self, path: Path, limits: Limits):
        self._path, self._limits = path, limits
        self.description = f"AliTok's archive, {places.size(path)} bytes"
        codes, self._labels = self._arrays(path, ArrayArchive.read)
        self._codes = codes if codes.ndim == 3 else codes[:, None]
        self.num_images, self.num_views, _ = self._codes.shape

    @classmethod
    def check(cls, path: Path, limits: Limits) -> None:
        """Looks at the names and shapes of the arrays."""
        codes, labels = cls._arrays(path, _stand_in)
        limits.check(codes[:1], labels[:1], lambda _: f"{path}")

    @staticmethod
    def _arrays(path: Path, read: Callable[[ArrayArchive, str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Codes and labels as `read` makes them of the open file and a name."""
        with open_npz(path, REMEDY) as arrays:
            codes, labels = (read(arrays, _pick(path, arrays, names)) for names in (CODES_NAMES, LABELS_NAMES))
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if codes.ndim not in (2, 3) or labels.shape != codes.shape[:1] or not codes.size:
            shapes = f"codes {codes.shape} and labels {labels.shape}"
            raise RearError(f"{path} has {shapes}, wanted [n, N] or [n, A, N] and [n].")
        return codes, labels

    def read(self, start: int, stop: int) -> Rows:
        codes, labels = self._codes[start:stop], self._labels[start:stop]
        self._limits.check(codes, labels, lambda row: f"{self._path}, image {start + row}")
        return _by_view(codes, labels)


def _stand_in(arrays: ArrayArchive, name: str) -> np.ndarray:
    """Zeros of the shape and dtype of an array, which take no memory; only its header is read."""
    shape, _, dtype = arrays.header(name)
    return np.broadcast_to(np.zeros((), dtype), shape)


def _pick(path: Path, arrays: ArrayArchive, names: tuple[str, ...]) -> str:
    """The one of the names that an array in the file has."""
    found = [name for name in names if name in arrays.members]
    if len(found) != 1:
        raise RearError(f"{path} must hold one array called {' or '.join(names)}; found {', '.join(arrays.members)}.")
    return found[0]


def _by_view(codes: np.ndarray, labels: np.ndarray) -> Rows:
    """Codes [n, A, N] and labels [n] as rows, the views of one image side by side."""
    images, views, _ = codes.shape
    rows = codes.reshape(images * views, -1).astype(np.int32)
    return rows, np.repeat(labels, views).astype(np.int32), np.tile(np.arange(views, dtype=np.int32), images)
