"""Where numbers and pictures go: metrics.jsonl, TensorBoard, the log, and the services of `config.writers`."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Self

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from rear_jax.errors import RearError
from rear_jax.runtime import distributed, places, trackers
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.pictures import save_png

log = logging.getLogger("rear_jax.metrics")

FLUSH_SECONDS = 20  # at least so often, TensorBoard sees what is new
GROUPS = {  # of tags, which TensorBoard shows together -> the metrics that are not of the objective
    "speed": ("steps_per_second", "images_per_second", "input_wait", "mfu", "device_hours", "corrupt_records"),
    "optimizer": ("learning_rate", "gradient_norm", "last_gradient_norm"),
}


class MetricWriter:
    """Writes one job's metrics; a resumed job first removes what a lost stretch of it had written.

    Of several processes only the first writes.
    """

    def __init__(self, workdir: Path, job: str, *, start_step: int):
        self._job = job
        self._trackers = trackers.active(workdir)
        self._file = places.appended(workdir / "metrics.jsonl")
        self._pictures = workdir / "pictures"
        self._board = None
        if distributed.is_first():
            _forget_after(self._file, job, start_step)
            places.upload_appended()
            self._board = _Board(workdir / "tensorboard" / job, start_step + 1)

    def write(self, step: int, metrics: dict[str, float], *, progress: str = "", saved: bool = False) -> None:
        """One line of numbers; in the log, `progress` stands in the place of the step.

        `saved` says that a checkpoint of this step follows. Lines up to it are not written again, so in a bucket they
        must be there first.
        """
        if self._board is None:
            return
        record = {"job": self._job, "step": step, **metrics}
        with self._file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in metrics.items():
            self._board.add(summary.scalar(tag_of(name), value), step)
        for prefix, tracker in self._trackers:
            group = f"{prefix}{self._job}"
            tracker.numbers(group, step, {f"{group}/{tag_of(name)}": value for name, value in metrics.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        log.info("%s %s  %s", self._job, progress or f"step {step}", shown)
        if saved:
            places.upload_appended()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """One picture [H, W, 3] uint8: to TensorBoard, and the newest of its name to a PNG."""
        if self._board is None:
            return
        self._board.add(summary.image(f"pictures/{name}", image, dataformats="HWC"), step)
        for prefix, tracker in self._trackers:
            group = f"{prefix}{self._job}"
            tracker.picture(group, step, f"{group}/pictures/{name}", image)
        save_png(self._pictures / f"{self._job}_{name}.png", image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        if self._board is not None:
            self._board.close()
            places.finish_appended(self._file)


def tag_of(name: str) -> str:
    """A metric's tag, with the group that it stands in."""
    group = next((group for group, names in GROUPS.items() if name in names), "objective")
    return f"{group}/{name}"


class _Board:
    """A TensorBoard file. It is written right here: tensorboardX's own thread, once a full disk has ended it, makes all
    others wait for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        """Opens a new file in the folder; what older ones say of steps from the first on is forgotten."""
        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._events.write_event(Event(step=first_step, file_version="brain.Event:2"))
        self._events.write_event(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, value: Summary, step: int) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._events.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


def read_metrics(workdir: Path, job: str) -> list[dict]:
    """All records that a job has written so far, in order of steps; a half-written last line is left out."""
    return [record for record in _records(workdir / "metrics.jsonl") if record["job"] == job]


def _forget_after(file: Path, job: str, step: int) -> None:
    """Drops the records of `job` that are later than `step`."""
    if not file.exists():
        return
    kept = [r for r in _records(file) if r["job"] != job or r["step"] <= step]
    with atomic_file(file) as temporary:
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))


def _records(file: Path) -> list[dict]:
    """What can be read of a file of metrics; raises RearError where there is something else at that place."""
    if not file.is_file():
        if os.path.lexists(file):
            raise RearError(f"{file} is not a file: remove it.")
        return []
    records = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.strip():
            log.warning("%s: skipping line %d, which was cut off while being written or is no record", file, number)
    return records


def _record(line: bytes) -> dict | None:
    """What a line says, None where it is not of this writer."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # torn, maybe inside a character
        return None
    of_a_job = isinstance(record, dict) and isinstance(record.get("job"), str) and type(record.get("step")) is int
    return record if of_a_job else None
