"""Packages that only some jobs need: the extras of pyproject.toml."""

import contextlib
from collections.abc import Iterator

from rear_jax.errors import RearError


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Surrounds the import of a package of an extra.

    Raises RearError: the package is not installed; the message names the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise RearError(
            f"the package {error.name!r} is not installed: pip install 'rear-jax[{extra}]', or in a checkout "
            f"pip install -e '.[{extra}]'."
        ) from error
