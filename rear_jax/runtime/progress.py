"""What a person sees of a running job: progress bars on a terminal, log lines there and in a file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Self

from tqdm import tqdm

from rear_jax.runtime import places

log = logging.getLogger(__name__)

EVERY = 60.0  # seconds between two lines of a job that has no terminal


class ProgressBar:
    """Shows how far a job is, its speed and the time left: a bar on a terminal, else a line in the log every minute.

    A job may begin in the middle: `start` counts as done, and the speed is that of this run alone.
    """

    def __init__(self, name: str, *, total: int, unit: str, start: int = 0):
        self._name, self._total, self._unit, self._start, self._done = name, total, unit, start, start
        self._began = self._said = time.monotonic()
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
        if self._bar.disable:
            self._say(done, logged=bool(values))
        elif values:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update(done - self._done)
        self._done = done

    def over(self, items: Iterable[Sized]) -> Iterator[Sized]:
        """Passes batches on and moves by the length of each."""
        for item in items:
            yield item
            self.update(self._done + len(item))

    def _say(self, done: int, *, logged: bool) -> None:
        """Logs a line if the last one is a minute old; `logged` is whether others have just said where the job is."""
        now = time.monotonic()
        if not logged and now - self._said < EVERY:
            return
        self._said = now
        if not logged and done > self._start:
            rate = (done - self._start) / (now - self._began)
            left = tqdm.format_interval((self._total - done) / rate)
            where = f"{self._name}: {self._unit} {done} of {self._total}"
            log.info("%s, %.3g %s/s, %s left", where, rate, self._unit, left)

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
    to_file = _ToFile(places.appended(file))
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s"))
    logger.addHandler(to_file)
