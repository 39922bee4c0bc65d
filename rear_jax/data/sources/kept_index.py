"""An index of large files, made once and kept: beside them, or in a cache folder where nothing can be written there.

The file begins with `.`, is replaced whole or not at all, and is made anew when a name, a size or a time of change of
the indexed files is not what it was.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime.array_files import open_npz
from rear_jax.runtime.atomic import atomic_file

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

VERSION = 4  # of what the kinds keep; raise it when that changes
FACTS = "facts"  # what the index is of


def kept_index(files: Sequence[Path], question: str, build: Callable[[], Arrays]) -> Arrays:
    """The index of some files, from where it was kept or from `build`.

    Args:
      files: what it is of, at least one.
      question: what beside the files decides what is in it.
      build: makes it; numeric arrays or arrays of strings.
    """
    facts = _facts(files, question)
    places = list(_places(files, question))
    for place in places:
        if (kept := _read(place, facts)) is not None:
            return kept
    log.info("making an index of %d files such as %s", len(files), files[0])
    arrays = build()
    for place in places:
        try:
            _write(place, arrays | {FACTS: facts})
        except OSError:
            continue
        log.info("kept the index in %s", place)
        return arrays
    log.warning("the index of %s can be kept in none of: %s", files[0].parent, ", ".join(map(str, places)))
    return arrays


def _facts(files: Sequence[Path], question: str) -> np.ndarray:
    """Names, sizes and times of change, uint8 [bytes]; the names hold wherever the folder is mounted."""
    states = [(os.path.relpath(file, files[0].parent), file.stat()) for file in files]
    facts = [VERSION, question, [(name, state.st_size, state.st_mtime_ns) for name, state in states]]
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def _places(files: Sequence[Path], question: str) -> Iterator[Path]:
    """Where an index may lie, the best place first."""
    folder = files[0].parent.absolute()
    names = [os.path.relpath(file, folder) for file in files]
    yield folder / f".rear_jax-{_digest([question, names])}.npz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    yield cache / "rear_jax" / f".rear_jax-{_digest([question, names, str(folder)])}.npz"


def _digest(content: list) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read(place: Path, facts: np.ndarray) -> Arrays | None:
    """What is kept there, or None where that is nothing, damaged, or of other files."""
    if not os.path.exists(place):
        return None
    try:
        with open_npz(place, "it is made again") as arrays:
            if np.array_equal(arrays.read(FACTS), facts):
                return {name: arrays.read(name) for name in arrays.members if name != FACTS}
    except RearError as error:
        log.warning("%s", error)
    return None


def _write(place: Path, arrays: Arrays) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place, writer=secrets.randbits(32)) as temporary:
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
