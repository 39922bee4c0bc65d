"""A run that is killed and started again ends like one that was not: bit for bit, in processes of their own."""

import gc
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from rear_jax import main
from rear_jax.data.codes import open_codes
from rear_jax.runtime.writer import read_metrics
from tests import toy

STEPS = 60
WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""  # runs a command that hears SIGINT, which a shell's `&` has ignored
TRAIN = ("--job=train", f"--config.train.loop.steps={STEPS}", "--config.train.ema_decay=0.9")
POSTTRAIN = (
    "--job=posttrain",
    *(f"--config.posttrain.loop.{value}" for value in (f"steps={STEPS}", "batch_size=4", "checkpoint_every=4")),
    *(f"--config.posttrain.{value}" for value in ("reward.perceptual=0", "kl_weight=0.01", "inner_updates=2")),
    *(f"--config.posttrain.optimizer.{value}" for value in ("learning_rate=1e-3", "final_learning_rate=1e-4")),
)


def final_state(workdir, name="generator"):
    """Every array of the last step's checkpoint."""
    assert (workdir / name / str(STEPS)).is_dir()
    return toy.saved_state(workdir / name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, trained):
    """Flags that point a fresh workdir at the trained toy tokenizer and its codes."""
    return (f"--config.tokenizer_from={trained / 'tokenizer'}", f"--config.codes_from={trained / 'codes'}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, prepared):
    workdir = tmp_path_factory.mktemp("unbroken")
    done = toy.finish(workdir, *TRAIN, *prepared)
    assert done.returncode == 0, done.stderr
    return workdir


def wait_for_checkpoint(folder) -> None:
    """Until one checkpoint is complete: until then there is nothing to go on from."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(p.name.isdigit() for p in folder.glob("*")):
            return
        time.sleep(0.005)
    raise TimeoutError(f"no checkpoint in {folder}")


def interrupt_and_resume(workdir, flags, name, signal_number) -> None:
    """Ends a run by a signal as soon as there is a checkpoint in the folder `name`, and starts it again."""
    process = toy.start(workdir, *flags)
    wait_for_checkpoint(workdir / name)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    if signal_number == signal.SIGTERM:
        assert process.returncode == 0, errors
        assert "resume with the same command" in errors
    else:
        assert process.returncode == -signal.SIGKILL
    resumed = toy.finish(workdir, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step" in resumed.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["job"] in ("train", "posttrain")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_resume_is_bit_exact(tmp_path, prepared, unbroken, signal_number):
    interrupt_and_resume(tmp_path, (*TRAIN, *prepared, "--config.train.loop.log_every=1"), "generator", signal_number)
    for a, b in zip(final_state(unbroken), final_state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_post_training_resumes_bit_exact(tmp_path, trained):
    """With a reference, which is read again, and with several updates a step."""
    start = (f"--config.tokenizer_from={trained / 'tokenizer'}", f"--config.init_from={trained / 'generator'}")
    unbroken = toy.finish(tmp_path / "unbroken", *POSTTRAIN, *start)
    assert unbroken.returncode == 0, unbroken.stderr
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        workdir = tmp_path / signal_number.name
        interrupt_and_resume(workdir, (*POSTTRAIN, *start), "posttrained", signal_number)
        for a, b in zip(*(final_state(f, "posttrained") for f in (tmp_path / "unbroken", workdir)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_compiles_ends_the_run(tmp_path, prepared, signal_number, monkeypatch):
    """With one line, without a lock, and so that the same command runs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))  # else it has compiled it already
    sizes = ("train.loop.steps=2", "model.depth=8", "model.unroll=8")
    flags = ("--job=train", *prepared, *(f"--config.{size}" for size in sizes))
    command = [sys.executable, "-c", WITH_SIGINT, *toy.command(tmp_path / "run", *flags)]
    process = subprocess.Popen(command, env=toy.environment(), stderr=subprocess.PIPE, text=True)
    while "compiling the training step" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGTERM if signal_number == signal.SIGTERM else 1), errors
    assert errors.splitlines() == [f"ended by {signal_number.name}: the same command goes on from what is on disk."]
    assert not (tmp_path / "run" / "lock.json").exists()
    again = toy.finish(tmp_path / "run", *flags)
    assert again.returncode == 0, again.stderr
    assert "stale" not in again.stderr
    assert (tmp_path / "run" / "generator" / "2").is_dir()


def last_step(workdir) -> int:
    """The last step that is logged."""
    file = workdir / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(workdir, "train")), default=0) if file.exists() else 0


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path, prepared, unbroken):
    """While steps run, while checkpoints are written, and while it starts again."""
    flags = (*TRAIN, *prepared, "--config.train.loop.log_every=1")
    random = np.random.default_rng()
    moments = sorted(random.uniform(0, STEPS - 1, 10))
    for moment in moments:
        process = toy.start(tmp_path, *flags)
        while process.poll() is None and last_step(tmp_path) < moment:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.communicate(timeout=60)
    done = toy.finish(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    for a, b in zip(final_state(unbroken), final_state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"killed at {moments}")


@pytest.mark.slow
def test_tokenizing_goes_on_after_sigkill(tmp_path, trained):
    """Complete shards stay, the rest is written again; the folder equals one that was written in one go."""
    flags = ("--job=tokenize", f"--config.tokenizer_from={trained / 'tokenizer'}", "--config.codes.num_shards=40")
    process = toy.start(tmp_path, *flags)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "codes" / "codes-00001-of-00040.array_record").exists():
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "codes" / "header.json").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "codes").glob("*.array_record")}
    assert toy.finish(tmp_path, *flags).returncode == 0
    assert all((tmp_path / "codes" / name).stat().st_mtime_ns == since for name, since in kept.items())
    again, whole = (open_codes(f / "codes").read(np.arange(4000)) for f in (tmp_path, trained))
    for name in whole:
        np.testing.assert_array_equal(again[name], whole[name])


def finish_limited(kibibytes: int, workdir, *flags: str) -> subprocess.CompletedProcess:
    """Runs the toy experiment where no file may grow beyond so much, as if the disk were full."""
    command = ["bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash", *toy.command(workdir, *flags)]
    return subprocess.run(command, env=toy.environment(), capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing_whole(tmp_path, trained):
    done = finish_limited(98, tmp_path, "--job=tokenize", f"--config.tokenizer_from={trained / 'tokenizer'}")
    assert done.returncode == 1
    assert "free space there and run again" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "codes").glob("*.array_record"))


@pytest.mark.slow
def test_tasks_that_a_failed_save_leaves_say_nothing(capfd, monkeypatch):
    """Such a task is a coroutine that nobody awaits; python warns of it when it is collected, behind the error."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    async def write():
        pass

    def leave():
        write()
        gc.collect()
        return capfd.readouterr().err

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(message, file=sys.stderr))
        assert "was never awaited" in leave()
        main._silence_unfinished_writing()
        assert leave() == ""


@pytest.mark.slow
def test_a_disk_that_fills_up_while_training_is_one_line(tmp_path, prepared, unbroken):
    """From the first checkpoint on no file may grow beyond 64 KiB: the second fails, in orbax's background thread."""
    flags = (*TRAIN, *prepared, "--config.train.loop.log_every=1")
    process = toy.start(tmp_path, *flags)
    wait_for_checkpoint(tmp_path / "generator")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, 2**16))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "saving a checkpoint to" in errors.splitlines()[-1]
    assert "free space there and run again" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    kept = [p.name for p in (tmp_path / "generator").iterdir() if p.name.isdigit()]
    assert kept
    done = toy.finish(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {max(map(int, kept))}" in done.stderr
    for a, b in zip(final_state(unbroken), final_state(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_eight_devices_take_the_same_steps(tmp_path, prepared, unbroken):
    done = toy.finish(tmp_path, *TRAIN, *prepared, devices=8)
    assert done.returncode == 0, done.stderr
    for a, b in zip(final_state(unbroken), final_state(tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_samples_without_room_are_one_line(tmp_path, trained, prepared):
    shutil.copytree(trained / "generator", tmp_path / "generator")
    done = finish_limited(60, tmp_path, "--job=sample", prepared[0])  # the set takes 72
    assert (done.returncode, done.stderr.splitlines()[-1].partition(":")[0]) == (1, "error"), done.stderr
    assert "Mend that and run the command again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "devices"), [(7, 1), (3, 8)])
def test_codes_do_not_depend_on_batch_size_or_devices(trained, tmp_path, rows, devices):
    """The very files, byte for byte."""
    flags = (f"--config.tokenizer_from={trained / 'tokenizer'}", f"--config.codes.batch_size={rows}")
    done = toy.finish(tmp_path, "--job=tokenize", *flags, devices=devices)
    assert done.returncode == 0, done.stderr
    for file in (trained / "codes").iterdir():
        assert (tmp_path / "codes" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_samples_do_not_depend_on_batch_size_or_devices(trained, tmp_path):
    sets = []
    for flags, devices in [(("--config.sample.batch_size=24",), 1), ((), 8)]:
        workdir = tmp_path / str(devices)
        shutil.copytree(trained, workdir)
        for name in ("samples.npz", "samples.json"):
            (workdir / name).unlink()
        done = toy.finish(workdir, "--job=sample", *flags, devices=devices)
        assert done.returncode == 0, done.stderr
        with np.load(workdir / "samples.npz") as file:
            sets.append(file["arr_0"].astype(int))
    with np.load(trained / "samples.npz") as file:
        for other in sets:  # the codes are the same; float rounding may move a pixel across an 8-bit border
            assert np.abs(file["arr_0"] - other).max() <= 1
