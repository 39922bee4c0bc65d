"""What a source is made of, in a few digits: by names, sizes and times of files, which nobody reads, or by the values.

A time of change counts because a picture that is repaired may keep its name and size.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

DIGITS = 15  # hexadecimal: 60 bits, so that processes can exchange them as one number

State = tuple[str, os.stat_result | None]  # name of a file and what the system says of it, None where it is lost


def of_states(states: Iterable[State], *facts: object) -> str:
    """Of files in this order, and of what else decides."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, state in states:
        told = f"{state.st_size} {state.st_mtime_ns}" if state else "lost"
        digest.update(f"{name}\0{told}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:DIGITS]


def of_files(files: Iterable[Path], *facts: object) -> str:
    """Of files by their names alone, so that they may be moved to another folder."""
    return of_states(((file.name, state_of(file)) for file in files), *facts)


def of_arrays(arrays: Iterable[np.ndarray], *facts: object) -> str:
    """Of all values of some arrays."""
    digest = hashlib.sha256(repr(facts).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()[:DIGITS]


def state_of(file: "os.DirEntry[str] | Path") -> os.stat_result | None:
    """What a file or link leads to, None where that is nothing."""
    try:
        return file.stat()
    except OSError:
        return None
