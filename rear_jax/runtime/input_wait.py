"""How long the devices had nothing to do because the next batch was not there."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax


class InputWait:
    """Adds up the seconds in which the host fetched a batch and the devices had finished all that they were given.

    A fetch that ends before the newest step does costs nothing, however long it takes. Otherwise what counts begins
    where that step ended, which a thread waits for, or where the fetch began if that is later. Devices that wait for
    anything else, such as a checkpoint, are not counted; nor is that, on a CPU, steps and input share its cores.
    """

    def __init__(self) -> None:
        self._watcher = ThreadPoolExecutor(1, "input_wait")
        self._idle, self._since = 0.0, time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._watcher.shutdown(wait=False)

    @contextlib.contextmanager
    def fetching(self, newest: Any) -> Iterator[None]:
        """Surrounds the fetch of a batch; `newest` is what the newest step on the devices gives, not donated to any."""
        finished = self._watcher.submit(_when_ready, newest)
        began = time.perf_counter()
        yield
        ended = time.perf_counter()
        if finished.done():
            self._idle += max(0.0, ended - max(began, finished.result()))

    def share(self) -> float:
        """Of the time since the last call, or since the beginning: 0 to 1."""
        now = time.perf_counter()
        share = self._idle / (now - self._since)
        self._idle, self._since = 0.0, now
        return share


def _when_ready(arrays: Any) -> float:
    """The time at which they are."""
    jax.block_until_ready(arrays)
    return time.perf_counter()
