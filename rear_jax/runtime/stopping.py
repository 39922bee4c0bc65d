"""SIGTERM and SIGINT end a training job after a step that all its processes agree on."""

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rear_jax.runtime.mesh import AXES


class Interrupted(Exception):
    """A signal asked the job to stop, and what it has done is on disk."""


def ended_by(signal_name: str) -> str:
    """The line of a command that a signal has ended in the midst of something that is not kept."""
    return f"ended by {signal_name}: the same command goes on from what is on disk."


class StopSign:
    """Says after which step to stop.

    One process stops after the step at which the signal came. Several send a flag along with each step, which finds out
    whether any is raised; its result is read `ahead` steps later, when it is there, so that nobody waits for it.
    """

    def __init__(self, mesh: Mesh, *, ahead: int):
        self._raised = threading.Event()
        self._sharding = NamedSharding(mesh, PartitionSpec(AXES))
        self._answers: collections.deque[jax.Array] = collections.deque(maxlen=ahead + 1)

    def flags(self) -> jax.Array | None:
        """Input of a step: int32 [devices], 1 on those of a process that was signalled; None where one is alone."""
        if jax.process_count() == 1:
            return None
        mine = np.full(jax.local_device_count(), self._raised.is_set(), np.int32)
        return jax.make_array_from_process_local_data(self._sharding, mine)

    def stops_after(self, answer: jax.Array | None) -> bool:
        """Whether the step that was just begun, whose answer this is, is the last; the same in every process."""
        if answer is None:
            return self._raised.is_set()
        self._answers.append(answer)
        return len(self._answers) == self._answers.maxlen and bool(self._answers[0])

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals raise the flag while the context lasts; outside the main thread there is none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {s: signal.signal(s, lambda *_: self._raised.set()) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def any_raised(flags: jax.Array | None) -> jax.Array | None:
    """Inside a step: its answer, bool, to `StopSign.flags`."""
    return None if flags is None else jnp.max(flags) > 0
