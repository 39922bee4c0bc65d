"""NumPy's files, .npy and .npz, from anywhere: what they claim is compared with what they have before room is made.

An .npz is a zip archive of .npy files. Formats: numpy/lib/format.py and APPNOTE.TXT of PKWARE.
"""

import ast
import contextlib
import lzma
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import ml_dtypes
import numpy as np

from rear_jax.errors import UNREADABLE, RearError, one_line
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.files import open_regular

BROKEN = (*UNREADABLE, RuntimeError, zipfile.BadZipFile, lzma.LZMAError)  # what libraries raise on damaged files
DENSEST = 1100  # bytes that a packed one can stand for; deflate reaches 1032
MAGIC = b"\x93NUMPY"
LENGTHS = {b"\1\0": "<H", b"\2\0": "<I", b"\3\0": "<I"}  # version -> how the length of the header is written
LONGEST_HEADER = 10_000  # bytes, as NumPy has it
KINDS = "biufcUS"  # of dtypes, numpy's letters
PIECE = 2**24  # bytes that are read at once


class Header(NamedTuple):
    """What a .npy says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ArrayArchive:
    """An open .npz.

    Attributes:
      members: name of an array -> its entry in the archive.
    """

    def __init__(self, file: zipfile.ZipFile, size: int):
        """Of an archive that is open, and its size in bytes."""
        self._file, self._size = file, size
        entries = (entry for entry in file.infolist() if entry.filename.endswith(".npy"))
        self.members = {entry.filename.removesuffix(".npy"): entry for entry in entries}

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[tuple[Header, BinaryIO]]:
        """An array's header, and the archive's member at its first value; its checksum is compared at its end."""
        if name not in self.members:
            raise KeyError(f"{name} is not a file in the archive")
        entry = self.members[name]
        if entry.compress_size > self._size or entry.file_size > DENSEST * entry.compress_size + DENSEST:
            raise ValueError(f"{entry.filename} claims {entry.file_size} bytes, packed in {entry.compress_size}")
        with self._file.open(entry) as member:
            header = read_header(member)
            if header.nbytes != entry.file_size - member.tell():
                raise ValueError(f"{entry.filename} has another size than its shape {header.shape}")
            yield header, member

    def header(self, name: str) -> Header:
        """Of one array."""
        with self.opened(name) as (header, _):
            return header

    def read(self, name: str) -> np.ndarray:
        """One array, whole."""
        with self.opened(name) as (header, member):
            return _values(header, member)


@contextlib.contextmanager
def open_npz(path: str | Path, remedy: str) -> Iterator[ArrayArchive]:
    """The arrays of an .npz, each read when it is asked for.

    Args:
      path: of the file.
      remedy: what a person can do about a file that is missing or damaged.

    Raises RearError: there is no such file; or, here and in the context, it turns out to be damaged.
    """
    with (
        open_regular(path, _otherwise(path, remedy)) as file,
        reading(path, remedy),
        zipfile.ZipFile(file) as archive,
    ):
        yield ArrayArchive(archive, os.fstat(file.fileno()).st_size)


def read_npy(path: str | Path, remedy: str) -> np.ndarray:
    """The array of a .npy, whole; arguments and errors as of `open_npz`."""
    with open_regular(path, _otherwise(path, remedy)) as file, reading(path, remedy):
        return _values(_header_of(file), file)


def map_npy(path: str | Path, remedy: str, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """The array of a .npy, memory-mapped, read-only unless `mode` is "r+"; else as `open_npz`."""
    with open_regular(path, _otherwise(path, remedy)) as file, reading(path, remedy):
        header = _header_of(file)
        if not header.nbytes:
            return np.empty(header.shape, header.dtype)
        order = "F" if header.fortran else "C"
        return np.memmap(file if mode == "r" else path, header.dtype, mode, file.tell(), header.shape, order)


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes a .npy under a temporary name and renames it.

    Raises:
      OSError: the disk is full; by its number, which `numpy.save` does not tell.
    """
    array = np.ascontiguousarray(array)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.reshape(-1).view(np.uint8))


def _otherwise(path: str | Path, remedy: str) -> str:
    return f"{path} {'is no file' if os.path.exists(path) else 'does not exist'}: {remedy}."


@contextlib.contextmanager
def reading(path: str | Path, remedy: str) -> Iterator[None]:
    """Turns what libraries raise on a damaged file into a RearError."""
    try:
        yield
    except BROKEN as error:
        told = one_line(str(error.args[0] if isinstance(error, KeyError) and error.args else error))[:200]
        raise RearError(f"{path} cannot be read ({told or type(error).__name__}): {remedy}.") from error


def read_header(file: BinaryIO) -> Header:
    """The header of a .npy, which is left at its first value; ValueError and others where it is damaged."""
    start = file.read(8)
    if start[:6] != MAGIC or start[6:] not in LENGTHS:
        raise ValueError("it starts like no .npy")
    form = LENGTHS[start[6:]]
    (length,) = struct.unpack(form, file.read(struct.calcsize(form)))
    if length > LONGEST_HEADER:
        raise ValueError(f"its header has {length} bytes")
    text = re.sub(r"(\d)L\b", r"\1", file.read(length).decode("latin-1"))  # Python 2 wrote 3L for 3
    fields = ast.literal_eval(text.strip())
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header is none")
    shape, fortran, described = fields["shape"], fields["fortran_order"], fields["descr"]
    if not (type(shape) is tuple and type(fortran) is bool and type(described) is str):
        raise ValueError("its header has values of other types")
    dtype = np.dtype(described)
    if dtype == np.dtype("V2"):  # as NumPy writes bfloat16
        dtype = np.dtype(ml_dtypes.bfloat16)
    if dtype.hasobject or not dtype.itemsize or (dtype.kind not in KINDS and dtype != ml_dtypes.bfloat16):
        raise ValueError(f"values of type {dtype} are not read")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(max(n, 1) for n in shape) >= 1 << 56:
        raise ValueError("its shape is none")
    return Header(tuple(shape), fortran, dtype)


def _header_of(file: BinaryIO) -> Header:
    """Of a file that must have as many values as its header says."""
    header = read_header(file)
    if header.nbytes != os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError(f"it has another size than its shape {header.shape}")
    return header


def _values(header: Header, file: BinaryIO) -> np.ndarray:
    """All that follows the header, whose claim has been compared with the size of the file."""
    data, done = np.empty(header.nbytes, np.uint8), 0
    while piece := file.read(PIECE):
        data[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if done != header.nbytes:
        raise EOFError("its values end early")
    return data.view(header.dtype).reshape(header.shape, order="F" if header.fortran else "C")
