"""How a job is followed: lines of the log, speed and cost, profiles, tags, services, and the table of scores."""

import dataclasses
import importlib.util
import json
import logging
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, jobs
from rear_jax.errors import RearError
from rear_jax.evaluation import report
from rear_jax.runtime import chips, profile, progress, trackers
from rear_jax.runtime.mesh import make_mesh
from rear_jax.runtime.writer import MetricWriter, read_metrics, tag_of
from rear_jax.sampling.preview import previewer
from rear_jax.training import loop, speed
from tests import toy
from tests.test_training import add, run_loop


@pytest.fixture
def lines():
    """What the project logs."""
    found: list[str] = []
    logger, handler = logging.getLogger("rear_jax"), logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return found


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = types.SimpleNamespace(seconds=100.0)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(f"time.{name}", lambda: now.seconds)
    return now


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", chips.GPUS["h100"]),
        ("NVIDIA H100 PCIe", None),
        ("TPU v5 lite", chips.TPUS["v5e"]),
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device(kind, chip):
    assert chips.of_kind(kind) is chip


def test_speed_time_left_cost_and_utilisation(clock):
    mesh = make_mesh(toy.config().mesh)
    meter = speed.Speed(mesh, 100, 8, share=0.5, spent=2.0)
    clock.seconds += 1800
    meter.restart()
    clock.seconds += 1800
    metrics, text = meter.of(40, 3600)
    assert metrics == {"steps_per_second": 2.0, "images_per_second": 16.0, "device_hours": 3.0, "mfu": 1.0}
    assert text == "step 40 of 100, 00:30 left"


def test_no_utilisation_where_the_chip_is_not_known(clock):
    meter = speed.Speed(make_mesh(toy.config().mesh), 100, 8, share=None, spent=0.0)
    clock.seconds += 1
    assert "mfu" not in meter.of(1, 1)[0]


def test_utilisation_counts_the_plain_computation(tmp_path, monkeypatch):
    """Of one product of two matrices [4, 4], which are 2 * 4 * 4 * 4 operations, on a chip that makes 64 a second."""

    def squared(train_state, batch, key, frozen):
        return train_state.replace(step=train_state.step + 1), {
            "loss": (np.ones((4, 4)) @ (batch["x"] * np.eye(4))).sum()
        }

    chip = dataclasses.replace(chips.GPUS["h100"], flops=64.0)
    monkeypatch.setattr(chips, "of_kind", lambda kind: chip)
    run_loop(tmp_path, squared)
    for record in read_metrics(tmp_path, "job"):
        assert record["mfu"] == pytest.approx(2 * record["steps_per_second"])


def test_a_training_says_what_it_does(tmp_path, lines):
    run_loop(tmp_path, add, log_every=2)
    compiling, compiled, *steps = [line for line in lines if line.startswith("job")][-5:]
    assert compiling.startswith("job: compiling")
    assert compiled.startswith("job: compiled in")
    assert all(f"step {n} of 6, 00:0" in line for n, line in zip((2, 4, 6), steps, strict=True))
    table = (tmp_path / "parameters_job.txt").read_text()
    assert "| sum  | ()    | float32 | 1    | 0.0  | 0.0 |" in table
    assert table.rstrip() in "\n".join(lines)


def test_hours_of_devices_add_up_over_runs(tmp_path):
    run_loop(tmp_path, add, steps=4)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"job": "job", "step": 4, "device_hours": 5.0}) + "\n")
    run_loop(tmp_path, add, steps=6)
    assert 5 < read_metrics(tmp_path, "job")[-1]["device_hours"] < 5.1


def test_without_a_terminal_there_is_a_line_a_minute(clock, lines, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with progress.ProgressBar("sample", total=1000, unit="image", start=100) as bar:
        for done in range(110, 301, 10):
            clock.seconds += 10
            bar.update(done)
    assert lines == [
        "sample: image 160 of 1000, 1 image/s, 14:00 left",
        "sample: image 220 of 1000, 1 image/s, 13:00 left",
        "sample: image 280 of 1000, 1 image/s, 12:00 left",
    ]


def test_no_line_beside_those_of_metrics(clock, lines):
    with progress.ProgressBar("train", total=100, unit="step") as bar:
        for step in range(1, 10):
            clock.seconds += 50
            bar.update(step, loss=1.0)
            bar.update(step)
    assert lines == []


@pytest.fixture
def traces(monkeypatch):
    """The calls of the profiler."""
    found: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(f"start {folder}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


@pytest.mark.parametrize(
    ("steps", "begin", "want"),
    [
        ((), 1, []),
        ((3, 4), 1, [(3, "start a"), (4, "stop")]),
        ((3, 5), 4, [(4, "start a"), (5, "stop")]),  # of a run that goes on within them
        ((3, 4), 5, []),
        ((7, 99), 1, [(7, "start a"), (8, "stop")]),  # the run ended
    ],
)
def test_a_profile_is_of_its_steps_once(traces, steps, begin, want):
    seen: list[tuple[int, str]] = []

    def note(step: int) -> None:
        seen.extend((step, call) for call in traces)
        traces.clear()

    with profile.Profile("job", pathlib.Path("a"), steps) as one:
        for step in range(begin, 8):
            one.before(step, None)
            note(step)
            one.after(step, None)
            note(step)
    note(8)
    assert seen == want


@pytest.mark.parametrize("steps", [(3,), (4, 3), (1, 99)])
def test_profiles_that_cannot_be(steps):
    settings = toy.config().train.loop
    settings.profile_steps = steps
    with pytest.raises(RearError, match=r"^job: loop.profile_steps = .*give the first and the last step"):
        loop.check("job", settings)


def test_tags_are_in_groups():
    assert [tag_of(name) for name in ("loss", "mfu", "gradient_norm")] == [
        "objective/loss",
        "speed/mfu",
        "optimizer/gradient_norm",
    ]


class Service:
    """Notes what a tracker is told."""

    def __init__(self, workdir, config):
        self.told = [config["seed"]]

    def numbers(self, group, step, values):
        self.told.append((group, step, dict(values)))

    def picture(self, group, step, tag, image):
        self.told.append((group, step, tag, image.shape))

    def close(self):
        self.told.append("closed")


def test_services_get_what_is_written(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *of: made.append(Service(*of)) or made[0])
    with trackers.tracking(("wandb",), tmp_path, {"seed": 7}):
        for folder in (tmp_path, tmp_path / "seed_0", tmp_path.parent):  # the last is not of this command
            folder.mkdir(exist_ok=True)
            with MetricWriter(folder, "train", start_step=0) as writer:
                writer.write(2, {"loss": 1.0, "learning_rate": 0.5})
        with MetricWriter(tmp_path, "train", start_step=2) as writer:
            writer.picture(3, "samples", np.zeros((4, 5, 3), np.uint8))
    numbers = {"objective/loss": 1.0, "optimizer/learning_rate": 0.5}
    assert made[0].told == [
        7,
        *(
            (group, 2, {f"{group}/{tag}": value for tag, value in numbers.items()})
            for group in ("train", "seed_0/train")
        ),
        ("train", 3, "train/pictures/samples", (4, 5, 3)),
        "closed",
    ]
    assert trackers.active(tmp_path) == []


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_service_whose_package_is_not_installed(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RearError, match=rf"pip install 'rear-jax\[{name}\]'"), trackers.tracking((name,), tmp_path, {}):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_real_service_goes_on_where_it_was(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for start in (0, 2):
        with (
            trackers.tracking((name,), tmp_path, {"a": 1}),
            MetricWriter(tmp_path, "train", start_step=start) as writer,
        ):
            for step in (start + 1, start + 2):
                writer.write(step, {"loss": 1 / step})
            writer.picture(start + 2, "samples", np.zeros((4, 4, 3), np.uint8))
    if name == "wandb":
        assert len({file.stem for file in tmp_path.rglob("*.wandb")}) == 1  # one run, in two parts
        assert len(list(tmp_path.rglob("*.wandb"))) == 2
    else:
        (kept,) = tmp_path.rglob("metrics/train/objective/loss")
        assert [line.split()[2] for line in kept.read_text().splitlines()] == ["1", "2", "3", "4"]
        assert len(list(tmp_path.rglob("artifacts/train/pictures/*.png"))) == 2


def test_a_preview_is_the_same_for_the_same_generator():
    made = toy.config()
    tokenizer, model = toy.tokenizer(made), toy.generator(made)
    image, inputs = jnp.zeros((1, 32, 32, 3)), generators.family_of(model).example_inputs(model)
    decoder = jax.jit(tokenizer.init)(jax.random.key(0), image)["params"]
    params = jax.jit(model.init)(jax.random.key(1), *inputs)["params"]
    opened = types.SimpleNamespace(module=tokenizer, params=decoder)
    preview = previewer(made, model, opened, lambda labels: labels, 10)
    with jax.set_mesh(make_mesh(made.mesh)):
        first, again = preview(params), preview(params)
    assert first.shape == (2 * 33 - 1, 8 * 33 - 1, 3)  # 16 images of 32 pixels, with a white line between
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_samples_are_drawn_while_a_generator_is_trained(trained, tmp_path):
    places = {"tokenizer_from": str(trained / "tokenizer"), "codes_from": str(trained / "codes")}
    toy.run(tmp_path, "train", **places, train__loop__steps=4, train__loop__picture_every=2)
    assert (tmp_path / "pictures" / "train_samples.png").is_file()


def test_the_resolved_config_is_beside_what_a_job_leaves(tmp_path, monkeypatch):
    nothing = dataclasses.replace(jobs.JOBS["sample"], run=lambda *_: None, check=lambda *_: None)
    monkeypatch.setitem(jobs.JOBS, "sample", nothing)
    jobs.run_all(("sample",), toy.config(seed=3), tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept == json.loads(json.dumps(toy.config(seed=3).to_dict()))


def test_scores_are_a_short_table():
    text = report.text_table({"scores": {"samples": {"FD": 1.23456, "recall": 0.5}, "held-out": {"FD": 0.1}}})
    assert text.splitlines() == [
        "        samples  held-out",
        "    FD    1.235       0.1",
        "recall      0.5          ",
    ]
