"""Faults in the middle: a full disk at each kind of write, lost checkpoints, clocks, signals, images that change."""

import errno
import itertools
import logging
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from rear_jax.data import sources
from rear_jax.data.codes import write_shard
from rear_jax.data.codes_header import CodesHeader
from rear_jax.errors import RearError
from rear_jax.jobs import train
from rear_jax.runtime import lock
from rear_jax.runtime.array_files import write_npy
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.figures import new_figure, save_figure
from rear_jax.runtime.pictures import save_png
from rear_jax.runtime.progress import set_up_logging
from rear_jax.runtime.stopping import Interrupted
from rear_jax.runtime.writer import MetricWriter, read_metrics
from rear_jax.sampling.sampled_set import SampledSet
from rear_jax.weights import safetensors_file, torch_writer
from tests import toy
from tests.test_training import add, run_loop

VALUES = {"w": np.arange(50_000, dtype=np.float32)}  # more than a buffer holds


def export_set(path: Path) -> None:
    partial = SampledSet(path.with_suffix(".partial"), {}, (3, 32, 32, 3), write=True)
    partial.export(path, np.arange(3))


def write_codes(path: Path) -> None:
    header = CodesHeader(9, 1, "center", 4, 16, 32, 10, "f00", "set", "train", 1)
    write_shard(path, header, np.zeros((9, 4), int), np.arange(9), np.zeros(9, int))


WRITERS: dict[str, Callable[[Path], None]] = {  # name of a file -> what writes such files
    "scores.json": lambda path: write_json(path, {"a": 1}),
    "samples.png": lambda path: save_png(path, np.zeros((32, 32, 3), np.uint8)),
    "sweep.png": lambda path: save_figure(path, new_figure(1, 1, 2.0, 2.0)[0]),
    "samples.npz": export_set,
    "codes.array_record": write_codes,
    "features.npy": lambda path: write_npy(path, VALUES["w"]),
    "out.safetensors": lambda path: safetensors_file.write(path, VALUES, VALUES.values()),
    "out.bin": lambda path: torch_writer.write(path, VALUES, VALUES.values()),
}


@pytest.fixture
def full_disk(monkeypatch):
    """The disk has no room for files that are written under a temporary name, until `undo` is called."""
    unlink = Path.unlink

    def unlink_and_fill(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        if self.suffix == ".tmp0":
            self.symlink_to("/dev/full")  # the system says ENOSPC of every byte

    monkeypatch.setattr(Path, "unlink", unlink_and_fill)
    return monkeypatch


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("before", [b"the old one", None])
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path, full_disk, name, before):
    """And the error is the system's own, by its number, of which the command makes one line; or that line."""
    path = tmp_path / name
    if before:
        path.write_bytes(before)
    with pytest.raises((OSError, RearError), match=r"No space left on device|free space there and run again") as raised:
        WRITERS[name](path)
    assert isinstance(raised.value, RearError) or raised.value.errno == errno.ENOSPC
    assert (path.read_bytes() if path.exists() else None) == before
    full_disk.undo()
    WRITERS[name](path)
    assert path.stat().st_size > 12
    assert not path.is_symlink()
    assert not list(tmp_path.glob("*.tmp0"))


@pytest.fixture
def small_files():
    """A function: from then on no file of this process may grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_metrics_without_room_are_an_error_and_go_on(tmp_path, small_files):
    with MetricWriter(tmp_path, "train", start_step=0) as writer:
        writer.write(1, {"loss": 2.0})
        small_files((tmp_path / "metrics.jsonl").stat().st_size + 5)
        with pytest.raises(OSError, match="File too large") as raised:
            writer.write(2, {"loss": 1.0})
        small_files(2**30)
    assert raised.value.errno == errno.EFBIG
    with MetricWriter(tmp_path, "train", start_step=1) as writer:
        writer.write(2, {"loss": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2]


def test_a_log_without_room_is_an_error(tmp_path, small_files):
    """logging itself would print a traceback for each line and go on."""
    set_up_logging(tmp_path / "log.txt")
    logger = logging.getLogger("rear_jax.test")
    try:
        logger.info("one line")
        small_files((tmp_path / "log.txt").stat().st_size + 5)
        with pytest.raises(OSError, match="File too large"):
            logger.info("another line")
    finally:
        small_files(2**30)


def same_end(workdir: Path, whole: Path, *, steps: Sequence[int] = (2, 4, 6, 8)) -> None:
    """A run that goes on to step 8 ends as the unbroken one in the other folder, with the metrics of these steps."""
    final, again = run_loop(whole, add, steps=8), run_loop(workdir, add, steps=8)
    assert float(again.params["sum"]) == float(final.params["sum"])
    assert [record["step"] for record in read_metrics(workdir, "job")] == list(steps)


@pytest.mark.parametrize("deleted", [(6,), (4, 6), ("checkpoints",)])
def test_deleted_checkpoints(tmp_path, deleted):
    """The newest, all, or their folder: it goes on from what is left, or begins anew."""
    run_loop(tmp_path / "run", add)
    for name in deleted:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / (str(name) if name != "checkpoints" else ""))
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_clock_that_is_set_back(tmp_path, monkeypatch):
    """By a year, between two runs and while they run: metrics, names and the lock do not ask for the time of day."""
    run_loop(tmp_path / "run", add)
    for step in (tmp_path / "run" / "checkpoints" / "6").rglob("*"):
        if step.is_file():
            step.write_bytes(b"")
    ticks = itertools.count()
    for name, unit in (("time", 1), ("time_ns", 10**9)):
        true = getattr(time, name)
        monkeypatch.setattr(time, name, lambda true=true, unit=unit: true() - (31_536_000 + 60 * next(ticks)) * unit)
    with lock.held(tmp_path / "run"):
        same_end(tmp_path / "run", tmp_path / "whole")
    with lock.held(tmp_path / "run"):
        pass
    assert len(list((tmp_path / "run" / "checkpoints").glob("6.damaged-*"))) == 1


def test_a_second_signal_while_the_state_is_saved(tmp_path, monkeypatch):
    """The impatient user presses twice: the state is saved all the same."""
    save = Checkpoints.save

    def save_and_signal(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        save(self, *arguments)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Checkpoints, "save", save_and_signal)
    with pytest.raises(Interrupted, match="saved at step 3 of 8; resume with the same command"):
        run_loop(tmp_path / "run", add, steps=8)
    monkeypatch.undo()
    same_end(tmp_path / "run", tmp_path / "whole", steps=[2, 3, 4, 6, 8])


def test_training_on_codes_of_other_images_says_so(tmp_path, caplog):
    """And asks for no images where there are none."""
    images = sources.split_facts(toy.config().data, "test").contents
    header = CodesHeader(9, 1, "center", 4, 16, 32, 10, "f00", "set", "test", 1, images=images)
    told = {}
    for name, changes in {
        "same": {},
        "other": {"data__train_split": "train"},
        "none": {"data__source": "folder", "data__path": str(tmp_path / "lost")},
    }.items():
        caplog.clear()
        with caplog.at_level("INFO", logger="rear_jax"):
            train._tell_of_other_images(header, toy.config(**changes), tmp_path)
        told[name] = caplog.text
    sources.forget_splits()
    assert "other images" not in told["same"] + told["none"]
    assert "codes holds codes of other images: a file or label has been added" in told["other"]
    assert "not compared with their images: the image path" in told["none"]
