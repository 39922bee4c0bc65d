"""A profile of some steps of a training, for the profile page of TensorBoard."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax

from rear_jax.runtime import places

log = logging.getLogger(__name__)


class Profile:
    """Records what host and devices do from the first to the last of some steps.

    At both ends the loop waits for the devices, so that the steps are whole; at no other step it does anything.
    """

    def __init__(self, job: str, folder: Path, steps: Sequence[int]):
        """Waits for the first of the steps.

        Args:
          job: named in the log.
          folder: for the profile, in a folder of the date.
          steps: first and last step; none for no profile.
        """
        self._job, self._folder = job, folder
        self._first, self._last = steps or (0, -1)
        self._running = False

    def before(self, step: int, newest: Any) -> None:
        """Begins, if this is the first step; `newest` is what the newest step on the devices gives."""
        if not self._running and self._first <= step <= self._last:
            jax.block_until_ready(newest)
            self._first, self._running = self._last + 1, True  # once
            self._traced = places.scratch(self._folder) if places.is_bucket(self._folder) else self._folder
            jax.profiler.start_trace(self._traced)

    def after(self, step: int, newest: Any) -> None:
        """Ends, if this was the last step."""
        if self._running and step >= self._last:
            jax.block_until_ready(newest)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        if places.is_bucket(self._folder):
            places.upload_into(self._traced, self._folder)
        log.info("%s: wrote a profile to %s: pip install xprof, then tensorboard --logdir", self._job, self._folder)
