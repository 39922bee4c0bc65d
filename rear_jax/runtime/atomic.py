"""Files that appear whole or not at all, and JSON that may be damaged all the same."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from rear_jax.errors import RearError
from rear_jax.runtime import places


@contextlib.contextmanager
def atomic_file(path: Path, *, writer: int = 0) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there is flushed to disk and renamed on a clean exit.

    A killed process leaves only the temporary file, which the next attempt overwrites. For a place in a bucket the
    temporary path is local, and the object appears when it is uploaded.

    Args:
      path: the file to make or replace.
      writer: tells processes apart that may write the same `path` at the same time.
    """
    if places.is_bucket(path):
        with places.written(path) as temporary:
            yield temporary
        return
    temporary = path.with_name(f"{path.name}.tmp{writer}")
    temporary.unlink(missing_ok=True)
    yield temporary
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, content: dict) -> None:
    """Writes JSON under a temporary name and renames it."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file; {} where there is no file, or it holds something else: cut off, or of another program.

    Raises RearError: there is a folder, a device or a pipe at that place.
    """
    if not path.is_file():
        if os.path.lexists(path):
            raise RearError(f"{path} is not a file: remove it.")
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
