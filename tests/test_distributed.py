"""Two real processes on this machine: they take the steps of one, stop together, and notice when one is lost."""

import json
import shutil
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from rear_jax.data.codes import open_codes, write_shard
from rear_jax.errors import RearError
from rear_jax.plan import chips, roofline
from rear_jax.runtime import distributed
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.writer import read_metrics
from rear_jax.training import fitting
from tests import toy
from tests.test_training import truncate

STEPS = 100
TRAIN = {
    "method__name": "ar",
    "model__dropout": 0.0,
    "train__loop__steps": STEPS,
    "train__loop__log_every": 1,
    "train__loop__checkpoint_every": 10,
}


REAR = ("--config.method.name=rear", "--config.model.dropout=0.1", "--config.train.loop.steps=12")
REAR += ("--config.train.loop.checkpoint_every=4",)


def start_two(workdir, trained, *extra, others=(), folders=(None, None), modules=()):
    """Two processes of `--job=train` with one device each, in these folders.

    `others` are flags of the second one alone; `modules` are folders of each one's own that come first on its path.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    given = {**TRAIN, "tokenizer_from": trained / "tokenizer", "codes_from": trained / "codes"}
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in given.items()]
    flags += [f"--coordinator_address={address}", "--num_processes=2", "--job=train", *extra]
    paths = [f"{modules[index]}:{toy.ROOT}" if modules else str(toy.ROOT) for index in range(2)]
    return [
        subprocess.Popen(
            toy.command(workdir, *flags, f"--process_id={index}", *(others if index else ())),
            env=toy.environment() | {"PYTHONPATH": paths[index]},
            cwd=folders[index],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def losses(workdir) -> dict[int, float]:
    """Of every step, by its number; each must have been logged once."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if r["job"] == "train"]
    assert steps == sorted(set(steps))
    return {r["step"]: r["loss"] for r in records if r["job"] == "train"}


def wait_for_checkpoint(workdir, processes) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(p.name.isdigit() for p in (workdir / "generator").glob("*")):
            return
        assert all(p.poll() is None for p in processes), [p.communicate()[1] for p in processes]
        time.sleep(0.01)
    raise TimeoutError(f"no checkpoint in {workdir}")


def finish_two(*arguments, **keywords) -> list[str]:
    """What two processes have written to stderr; both must end well."""
    processes = start_two(*arguments, **keywords)
    errors = [p.communicate(timeout=240)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    return errors


def assert_same_metrics(one, other, job):
    """Every logged metric to float32 rounding, and exactly what only counts random choices."""
    records = [read_metrics(workdir, job) for workdir in (one, other)]
    for a, b in zip(*records, strict=True):
        assert a.get("noise") == b.get("noise")
        for name in a.keys() - {"job", "steps_per_second", "images_per_second", "device_hours", "input_wait"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)


@pytest.fixture(scope="module")
def rear_alone(tmp_path_factory, trained):
    """The workdir of one process that trained reAR with dropout."""
    workdir = tmp_path_factory.mktemp("rear_alone")
    changes = {"method__name": "rear", "model__dropout": 0.1, "train__loop__steps": 12, "train__loop__log_every": 1}
    places = {"tokenizer_from": str(trained / "tokenizer"), "codes_from": str(trained / "codes")}
    toy.run(workdir, "train", **changes, **places, train__loop__checkpoint_every=4)
    return workdir


@pytest.mark.slow
def test_noise_and_dropout_of_two_processes_are_those_of_one_and_the_first_writes(tmp_path, trained, rear_alone):
    errors = finish_two(tmp_path, trained, *REAR)
    assert_same_metrics(rear_alone, tmp_path, "train")
    assert "train step 12" in errors[0]
    assert "train" not in errors[1]
    assert len(list((tmp_path / "tensorboard" / "train").iterdir())) == 1
    assert (tmp_path / "log.txt").read_text().count("train step 12 ") == 1


@pytest.mark.slow
def test_two_processes_go_on_from_one_whose_newest_checkpoint_is_damaged(tmp_path, trained, rear_alone):
    shutil.copytree(rear_alone, tmp_path, dirs_exist_ok=True)
    truncate(tmp_path / "generator" / "12" / "state")
    errors = finish_two(tmp_path, trained, *REAR)
    assert "generator/12 is damaged and was set aside; going back to step 8" in errors[0]
    assert_same_metrics(rear_alone, tmp_path, "train")


@pytest.mark.slow
def test_two_processes_train_a_tokenizer_as_one(tmp_path, trained):
    finish_two(tmp_path, trained, "--config.tokenizer_from=", "--job=tokenizer")
    assert_same_metrics(trained, tmp_path, "tokenizer")
    assert (tmp_path / "reconstructions.png").exists()


@pytest.mark.slow
def test_two_processes_write_the_codes_of_one(tmp_path, trained):
    finish_two(tmp_path, trained, "--config.codes_from=", "--job=tokenize")
    for file in (trained / "codes").iterdir():
        assert (tmp_path / "codes" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.fixture(scope="module")
def alone(tmp_path_factory, trained):
    """The losses of one process."""
    workdir = tmp_path_factory.mktemp("alone")
    run_alone(workdir, trained)
    return losses(workdir)


def run_alone(workdir, trained) -> None:
    toy.run(workdir, "train", tokenizer_from=str(trained / "tokenizer"), codes_from=str(trained / "codes"), **TRAIN)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path, trained, alone):
    """A signal that reaches only the second: both save the same step, and its steps were those of one process."""
    processes = start_two(tmp_path, trained)
    wait_for_checkpoint(tmp_path, processes)
    processes[1].send_signal(signal.SIGTERM)
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    stopped = [next(line for line in e.splitlines() if "resume with the same command" in line) for e in errors]
    assert stopped[0] == stopped[1]
    assert max(losses(tmp_path)) < STEPS
    run_alone(tmp_path, trained)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_two_processes_draw_the_set_of_one(tmp_path, trained):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "samples.npz").unlink()
    finish_two(tmp_path, trained, "--config.method.name=rear", "--job=sample")
    with np.load(tmp_path / "samples.npz") as drawn, np.load(trained / "samples.npz") as wanted:
        np.testing.assert_array_equal(drawn["labels"], wanted["labels"])
        assert np.abs(drawn["arr_0"].astype(int) - wanted["arr_0"]).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_other_ends_when_one_is_killed(tmp_path, trained, alone, killed):
    processes = start_two(tmp_path, trained)
    wait_for_checkpoint(tmp_path, processes)
    processes[killed].kill()
    since = time.monotonic()
    _, errors = processes[1 - killed].communicate(timeout=120)
    assert time.monotonic() - since < 60
    assert processes[1 - killed].returncode not in (0, None), errors
    finish_two(tmp_path, trained)
    assert losses(tmp_path) == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_the_other_ends_after_an_error_that_nobody_foresaw(tmp_path, trained):
    """One waits in a module that the other fails to import."""
    bodies = ["import time; time.sleep(600)", "raise RuntimeError('unforeseen')"]
    for index, body in enumerate(bodies):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "tensorflow_datasets.py").write_text(body)
    modules = (tmp_path / "0", tmp_path / "1")
    flags = ("--job=tokenize", "--config.data.source=tfds")
    processes = start_two(tmp_path / "run", trained, *flags, modules=modules)
    errors = processes[1].communicate(timeout=120)[1]
    since = time.monotonic()
    assert processes[1].returncode == 1, errors
    assert "RuntimeError: unforeseen" in errors
    _, errors = processes[0].communicate(timeout=120)
    assert time.monotonic() - since < 60
    assert processes[0].returncode not in (0, None), errors


@pytest.mark.slow
def test_processes_choose_what_fits_the_smallest_of_all_devices(tmp_path, trained):
    """The second process alone has a device with too little memory for the whole batch."""
    whole = roofline.compile_fitting(
        toy.config(**TRAIN, train__loop__batch_size=32), "train", chips.topology("a100:2")
    ).needed
    for index, limit in enumerate((10**12, int(0.7 * whole / fitting.USED))):
        (tmp_path / str(index)).mkdir()
        patch = f"from rear_jax.training import fitting\nfitting.memory_limit = lambda mesh: {limit}\n"
        (tmp_path / str(index) / "sitecustomize.py").write_text(patch)
    flags = ("--config.train.loop.batch_size=32", "--config.train.loop.steps=2")
    finish_two(tmp_path / "run", trained, *flags, modules=(tmp_path / "0", tmp_path / "1"))
    checkpoints = Checkpoints(tmp_path / "run" / "generator", keep=1)
    assert checkpoints.record()["train"]["accumulation"] > 1


@pytest.mark.slow
def test_processes_whose_codes_differ_are_refused(tmp_path, trained):
    """One path, read by each from a folder of its own: the second has another code in one record."""
    for index in range(2):
        shutil.copytree(trained / "codes", tmp_path / str(index) / "codes")
    codes = open_codes(tmp_path / "1" / "codes")
    records = codes.read(np.arange(codes.header.shard_sizes[0]))
    records["codes"][0, 0] = (records["codes"][0, 0] + 1) % 16
    path = codes.header.shard_path(tmp_path / "1" / "codes", 0)
    write_shard(path, codes.header, records["codes"], records["label"], records["augmentation"])
    folders = (tmp_path / "0", tmp_path / "1")
    processes = start_two(tmp_path / "run", trained, "--config.codes_from=codes", folders=folders)
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    assert any("process(es) 1 differ from process 0 in the codes in codes: mend that host" in e for e in errors), errors


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path, trained):
    processes = start_two(tmp_path, trained, others=("--config.seed=1",))
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    assert any("process(es) 1 differ from process 0 in jobs, config or workdir" in e for e in errors), errors


@pytest.mark.slow
@pytest.mark.parametrize("job", ["tokenizer", "tokenize", "train"])
def test_processes_whose_images_differ_are_refused(tmp_path, trained, job):
    """One path, read by each from a folder of its own: the second has another pixel in one image."""
    images = np.random.default_rng(0).integers(0, 255, (10, 32, 32, 3)).astype(np.uint8)
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        images[9, 0, 0, 0] += index
        np.savez(tmp_path / str(index) / "images.npz", images=images, labels=np.arange(10))
    flags = ["--config.data.source=arrays", "--config.data.path=images.npz", "--config.data.train_split="]
    flags += ["--config.data.eval_split=", f"--job={job}", "--config.codes.on_the_fly=true"]
    if job == "tokenizer":
        flags += ["--config.tokenizer_from="]  # so that there is one to train
    if job == "tokenize":
        flags += [f"--config.codes_from={tmp_path / 'codes'}"]  # where none of other images are
    processes = start_two(tmp_path / "run", trained, *flags, folders=(tmp_path / "0", tmp_path / "1"))
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    assert any("process(es) 1 differ from process 0 in the images of images: mend that host" in e for e in errors), (
        errors
    )


@pytest.mark.parametrize("given", [("localhost:1", None, None), (None, 2, 0), (None, None, 1)])
def test_half_an_address_is_refused(given):
    with pytest.raises(RearError, match="belong together"):
        distributed.start(*given)
