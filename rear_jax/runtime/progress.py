"""What a person sees of a running job: progress bars on a terminal, log lines there and in a file."""

import logging
import sys
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Self

from tqdm import tqdm


class ProgressBar:
    """Shows how far a job is, its speed and the time left.

    A job may begin in the middle: `start` counts as done, and the speed is that of this run alone.
    """

    def __init__(self, name: str, *, total: int, unit: str, start: int = 0):
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=name,
            unit=unit,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )

    def update(self, done: int, **values: float) -> None:
        """Moves the bar to `done` and shows the latest values beside it."""
        if values:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def over(self, items: Iterable[Sized]) -> Iterator[Sized]:
        """Passes batches on and moves by the length of each."""
        for item in items:
            yield item
            self.update(self._bar.n + len(item))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()


class _AboveBars(logging.Handler):
    """Prints lines to stderr without breaking a progress bar; metrics are left to the bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if not (record.name == "rear_jax.metrics" and sys.stderr.isatty()):
            tqdm.write(self.format(record), file=sys.stderr)


class _ToFile(logging.FileHandler):
    """Raises what goes wrong, a full disk for one, where logging would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def set_up_logging(file: Path, *, quiet: bool = False) -> None:
    """Sends the project's log lines to the terminal and, with their times, to the end of a file.

    `quiet` is for all processes of a job but one: warnings alone, and no file.
    """
    logger = logging.getLogger("rear_jax")
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    logger.handlers = [_AboveBars()]
    if quiet:
        return
    to_file = _ToFile(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    logger.addHandler(to_file)
