"""The command that was typed, for the log and for messages that say what to type next."""

import shlex
import sys
from pathlib import Path

SCRIPT = "rear-jax"


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
