"""The command that was typed, for the log and for messages that say what to type next, and what it runs on."""

import importlib.metadata
import logging
import platform
import shlex
import sys
from pathlib import Path

import jax

import rear_jax

log = logging.getLogger(__name__)

SCRIPT = "rear-jax"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def typed(job: str | None = None) -> str:
    """The command of this process as one would type it, of another job if one is given."""
    name = Path(sys.argv[0]).name
    program = [name] if name == SCRIPT else ["python", "-m", "rear_jax"]
    arguments, words = [], iter(sys.argv[1:])
    for word in words:
        if job is not None and word.lstrip("-") == "job":
            next(words, None)
        elif job is None or not word.lstrip("-").startswith("job="):
            arguments.append(word)
    return shlex.join([*program, *arguments, *([f"--job={job}"] if job is not None else [])])


def version() -> str:
    """Of this package, the interpreter and the libraries that results depend on."""
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return f"rear_jax {rear_jax.__version__} (Python {platform.python_version()}, {found})"


def introduce() -> None:
    """What the log of a command begins with."""
    processes = jax.process_count()
    where = f"{processes} process{'' if processes == 1 else 'es'}"
    log.info("command: %s", typed())
    log.info("%s", version())
    log.info("devices: %d x %s, %s", jax.device_count(), jax.devices()[0].device_kind, where)
