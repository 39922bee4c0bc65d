"""Files that somebody else gives: only regular ones are opened, so that no pipe or device is ever waited for."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from rear_jax.errors import RearError
from rear_jax.runtime import places


def open_regular(path: str | Path, otherwise: str) -> BinaryIO:
    """Opens a regular file, or a link to one, to be read; of an object in a bucket, a local copy.

    Args:
      path: of the file.
      otherwise: what a message says where there is none.

    Raises RearError: there is nothing, or a folder, pipe, socket or device, or a loop of links; or it may not be read.
    """
    try:
        descriptor = os.open(places.local(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise RearError(otherwise) from None
    except (OSError, ValueError) as error:
        raise RearError(f"{otherwise} ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RearError(otherwise)
    return os.fdopen(descriptor, "rb")


def irregular_in(folder: str | Path) -> str | None:
    """The first entry under a folder that is neither file nor folder (a pipe, a broken link); None = there is none."""
    for place, folders, names in os.walk(folder):
        for name in (*names, *folders):
            entry = os.path.join(place, name)
            if not (os.path.isfile(entry) or os.path.isdir(entry)):
                return entry
    return None
