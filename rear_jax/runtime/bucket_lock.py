"""The object that locks a workdir in a bucket.

Each time it is written the bucket gives it another generation, a number. Who writes or removes it names the generation
that they have seen, and the bucket refuses if it is another one by now (`if_generation_match`). So of several processes
one succeeds, whichever hosts they are on.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rear_jax.runtime.extras import needed

NONE = 0  # the generation of an object that is not there


def write(file: Path, text: str, generation: int) -> bool:
    """Makes or replaces an object; False where its generation is another one. Raises OSError: no answer."""
    with _answering() as refused:
        _object(file).upload_from_string(text, content_type="application/json", if_generation_match=generation)
    return not refused


def read(file: Path) -> tuple[bytes, int] | None:
    """What an object holds, and its generation; None where there is none. Raises OSError: no answer."""
    found = _object(file)
    with _answering() as refused:
        content = found.download_as_bytes()
    return None if refused else (content, found.generation)


def remove(file: Path, generation: int) -> None:
    """Removes an object if it is still of this generation. Raises OSError: no answer."""
    with _answering():
        _object(file).delete(if_generation_match=generation)


def _object(file: Path) -> Any:
    _, _, bucket, *name = file.parts
    return _client().bucket(bucket).blob("/".join(name))


@functools.cache
def _client() -> Any:
    with needed("gcs"):
        from google.cloud import storage
    return storage.Client()


@contextlib.contextmanager
def _answering() -> Iterator[list[Exception]]:
    """Adds to a list that the object is missing or of another generation; other errors become an OSError."""
    from google.api_core.exceptions import GoogleAPIError, NotFound, PreconditionFailed
    from google.auth.exceptions import GoogleAuthError

    refused: list[Exception] = []
    try:
        yield refused
    except (NotFound, PreconditionFailed) as error:
        refused.append(error)
    except (GoogleAPIError, GoogleAuthError) as error:
        raise OSError(f"the bucket answers: {error}") from error
