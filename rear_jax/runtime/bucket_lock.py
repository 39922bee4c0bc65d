"""The object that locks a workdir in a bucket.

Each time it is written the bucket gives it another generation, a number. Who writes or removes it names the generation
that they have seen, and the bucket refuses if it is another one by now (`if_generation_match`). So of several processes
one succeeds, whichever hosts they are on.
"""

import functools
from pathlib import Path
from typing import Any

from rear_jax.runtime.extras import needed

NONE = 0  # the generation of an object that is not there


def write(file: Path, text: str, generation: int) -> bool:
    """Makes or replaces an object; False where its generation is another one."""
    try:
        _object(file).upload_from_string(text, content_type="application/json", if_generation_match=generation)
    except _refused():
        return False
    return True


def read(file: Path) -> tuple[bytes, int] | None:
    """What an object holds, and its generation; None where there is none."""
    found = _object(file)
    try:
        return found.download_as_bytes(), found.generation
    except _missing():
        return None


def remove(file: Path, generation: int) -> None:
    """Removes an object if it is still of this generation."""
    try:
        _object(file).delete(if_generation_match=generation)
    except (_missing(), _refused()):
        return


def _object(file: Path) -> Any:
    _, _, bucket, *name = file.parts
    return _client().bucket(bucket).blob("/".join(name))


@functools.cache
def _client() -> Any:
    with needed("gcs"):
        from google.cloud import storage
    return storage.Client()


def _missing() -> type[Exception]:
    from google.api_core import exceptions

    return exceptions.NotFound


def _refused() -> type[Exception]:
    from google.api_core import exceptions

    return exceptions.PreconditionFailed
