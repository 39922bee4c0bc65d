"""Images and pairs that are of no use: counted, the first few named, and no more of them than a share."""

import functools
import logging
from collections.abc import Iterable, Mapping

import numpy as np

from rear_jax.errors import RearError, one_line

log = logging.getLogger(__name__)

EXAMPLES = 3  # that a message names
LONGEST_EXAMPLE = 200  # characters


class Tally:
    """How many things of a kind there are, and the first few by name."""

    def __init__(self, count: int = 0, examples: Iterable[str] = ()):
        self.count, self.examples = count, list(examples)

    def add(self, what: str) -> None:
        """Counts one more; `what` names it on one line."""
        self.count += 1
        if len(self.examples) < EXAMPLES:
            line = one_line(what)
            self.examples.append(line if len(line) <= LONGEST_EXAMPLE else f"{line[:LONGEST_EXAMPLE]}...")

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """As a kept index holds it, under two names that begin with `name`."""
        return {f"{name}_count": np.array(self.count), f"{name}_examples": np.array(self.examples, np.str_)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> "Tally":
        """What `arrays` made."""
        return cls(int(arrays[f"{name}_count"]), arrays[f"{name}_examples"].tolist())

    def __str__(self) -> str:
        more = ["..."] if self.count > len(self.examples) else []
        return "; ".join([*self.examples, *more])


class Broken:
    """The broken pairs of a source, or its broken images where it has classes.

    Args:
      name: of the source, for messages.
      max_share: `config.data.max_broken_share`, in [0, 1).

    Raises RearError: the share is no such number.
    """

    def __init__(self, name: str, max_share: float):
        if not 0 <= max_share < 1:
            raise RearError(f"config.data.max_broken_share = {max_share}: choose a share from 0 to below 1")
        self._name, self._max_share = name, max_share
        self._skipped = 0  # left out of the source when it was opened
        self._indices: set[int] = set()

    def skip(self, tally: Tally, good: int) -> None:
        """Leaves pairs out of a source that has `good` others; raises RearError where they are too many."""
        self._skipped = tally.count
        if tally.count:
            self._require(good, f"{self._name}: {tally}")
            log.warning("%s: left out %d broken of %d: %s", self._name, tally.count, good + tally.count, tally)

    def replace(self, index: int, length: int, reason: str) -> None:
        """Counts image `index` of `length`, which cannot be read, once; raises RearError where they are too many."""
        self._count(index, length, reason, "the next readable image takes its place")

    def leave_out(self, index: int, length: int, reason: str) -> None:
        """The same of an image that nothing takes the place of."""
        self._count(index, length, reason, "it is left out")

    def _count(self, index: int, length: int, reason: str, told: str) -> None:
        if index not in self._indices:
            self._indices.add(index)
            self._require(length, reason)
            log.warning("%s; %s", reason, told)

    def _require(self, length: int, reason: str) -> None:
        count, total = self._skipped + len(self._indices), self._skipped + length
        if count > self._max_share * total:
            raise RearError(
                f"{reason}; {count} of {total} are broken so far, config.data.max_broken_share = {self._max_share} "
                "allows no more: repair or remove them, or raise it"
            )


def warn_of_left_out(name: str, tally: Tally) -> None:
    """One line in the log about files and folders that are no part of a source."""
    if tally.count:
        warn_once(f"{name}: left out {tally.count} files or folders that are no images of it: {tally}")


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning that a command needs once, though its jobs open the same source again and again."""
    log.warning("%s", message)
