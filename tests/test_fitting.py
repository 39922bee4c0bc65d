"""How a job fits into its devices' memory: the search on artificial programs, and real runs under a made-up limit."""

import dataclasses
import logging
import math

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.precision import standing_in_for
from rear_jax.training import fitting, loop, vq
from rear_jax.training.fitting import Attempt, Choice
from tests import toy

FIXED, PER_IMAGE = 3.0, {"none": 1.0, "products": 0.4, "full": 0.1}  # GiB; microbatches add a sum of gradients


class Programs:
    """Programs whose memory grows along a line with the images of a microbatch; notes what was compiled."""

    def __init__(self, rows: int, scale: float = 1.0, gradients: float = 0.5, told: bool = True):
        self.rows, self.scale, self.gradients, self.told, self.compiled = rows, scale, gradients, told, []

    def needed(self, choice: Choice) -> float:
        """What it takes."""
        several = self.gradients if choice.accumulation > 1 else 0.0
        return FIXED + several + self.scale * PER_IMAGE[choice.remat] * self.rows / choice.accumulation

    def attempt(self, choice: Choice, limit: float) -> Attempt:
        """Compiles; a compiler that does not tell only refuses what does not fit."""
        self.compiled.append(choice)
        needed = self.needed(choice)
        return Attempt(needed if self.told or needed <= limit else math.inf, str(choice))

    def choose(self, limit: float, **changes):
        """What is chosen of all that there is."""
        groups = fitting.options(toy.config(**changes), "train", self.rows)
        return fitting.choose(groups, lambda choice: self.attempt(choice, limit), limit, FIXED)


@pytest.mark.parametrize(
    ("rows", "scale", "limit", "want"),
    [
        (8, 1.0, 16.0, (1, "none")),  # all of it
        (256, 1.0, 74.0, (4, "none")),  # 2 microbatches of 128 images take 131.5
        (256, 1.0, 13.0, (32, "none")),  # 8 images, the fewest
        (256, 1.0, 11.0, (16, "products")),  # rather than microbatches of 4 images
        (256, 8.0, 15.0, (32, "full")),
        (256, 8.0, 7.0, (64, "full")),  # 4 images
        (8, 1.0, 7.0, (1, "products")),  # there are no microbatches of 8 images but one
        (8, 1.0, 4.0, (1, "full")),
        (1, 1.0, 4.0, (1, "none")),
        (1, 1.0, 3.3, (1, "full")),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_the_fastest_that_fits_is_found_in_few_compilations(rows, scale, limit, want, told):
    programs = Programs(rows, scale, told=told)
    choice, found = programs.choose(limit)
    near = (want, (2 * want[0], want[1]))  # from what fits alone less can be told
    assert choice == want if told else choice in near
    assert found == Attempt(programs.needed(choice), str(choice))
    assert len(programs.compiled) == len(set(programs.compiled)) <= (5 if told else 9)


def test_one_compilation_where_the_whole_batch_fits():
    programs = Programs(8)
    programs.choose(11.0)
    assert programs.compiled == [(1, "none")]


@pytest.mark.parametrize("seed", range(20))
def test_it_fits_whatever_the_numbers(seed):
    """Nothing that is preferred and at least a tenth smaller than the limit is passed over, one step left out."""
    random = np.random.default_rng(seed)
    rows = int(random.choice([4, 16, 96, 256]))
    programs = Programs(rows, scale=10 ** random.uniform(-2, 0.5), gradients=random.uniform(0, 2))
    limit = random.uniform(6, 80)
    choice, found = programs.choose(limit)
    every = [one for group in fitting.options(toy.config(), "train", rows) for one in group]
    fits = [one for one in every if programs.needed(one) <= limit]
    assert (found.needed <= limit) == bool(fits)
    better = every[: every.index(choice)] if fits else []
    assert sum(programs.needed(one) <= 0.9 * limit for one in better) <= 1


def test_tpus_compute_again_what_lies_between_products():
    programs = Programs(8)
    with standing_in_for("tpu"):
        assert programs.choose(11.0)[0] == (1, "products")


def test_what_the_config_says_stays():
    programs = Programs(256)
    assert programs.choose(74.0, train__accumulation=2)[0] == (2, "products")
    assert programs.choose(74.0, model__remat="full")[0] == (1, "full")
    assert {remat for _, remat in Programs(256).compiled} <= {"full"}
    assert programs.choose(1000.0, train__accumulation=16)[0] == (16, "none")


def test_the_least_is_named_where_nothing_fits():
    programs = Programs(256)
    choice, found = programs.choose(3.05)  # the state alone fits
    assert found.needed == min(programs.needed(one) for one in programs.compiled) > 3.05
    assert choice.remat == "full"
    programs = Programs(256)
    programs.choose(2.0)  # not even that
    assert len(programs.compiled) == 1


def test_the_sum_of_gradients_can_be_what_does_not_fit():
    assert Programs(16, gradients=10.0).choose(5.0)[0] == (1, "full")


def test_an_overflow_is_read_from_what_the_compiler_says():
    says = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.50G) is"
    assert fitting.overflow(JaxRuntimeError(says), 5) == 19.5 * 2**30 + 5
    says = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm."
    assert fitting.overflow(JaxRuntimeError(says), 2**30) == 17 * 2**30
    assert (
        fitting.overflow(JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 5) == math.inf
    )
    with pytest.raises(JaxRuntimeError, match="UNIMPLEMENTED"):
        fitting.overflow(JaxRuntimeError("UNIMPLEMENTED: no such thing"), 5)


@pytest.fixture
def compiled(monkeypatch):
    """The settings of every program that a job compiles, (accumulation, remat), and what they take in bytes."""
    found, steps = [], []
    taken, compiled_step = fitting.taken, loop.compiled_step

    def noting(learning, mesh):
        steps.append(learning.job)
        return compiled_step(learning, mesh)

    monkeypatch.setattr(loop, "compiled_step", noting)
    monkeypatch.setattr(fitting, "taken", lambda program: found.append(taken(program)) or found[-1])
    return steps, found


def train(workdir, trained, **changes) -> None:
    """The toy generator with batches of 32 images, on the codes that are there."""
    places = {"tokenizer_from": str(trained / "tokenizer"), "codes_from": str(trained / "codes")}
    changes = {"train__loop__batch_size": 32, "train__loop__steps": 8, "method__name": "ar"} | places | changes
    toy.run(workdir, "train", **changes)


def record(workdir, name="generator") -> dict:
    """What is stored beside the newest checkpoint."""
    checkpoints = Checkpoints(workdir / name, keep=1)
    try:
        return checkpoints.record()
    finally:
        checkpoints.close()


def limit(monkeypatch, size: float | None) -> None:
    """Every device has so many bytes from now on."""
    monkeypatch.setattr(fitting, "memory_limit", lambda mesh: size and int(size))


@pytest.mark.slow
def test_a_run_on_cpus_compiles_once(tmp_path, trained, compiled, caplog):
    caplog.set_level(logging.INFO)
    train(tmp_path, trained, train__loop__steps=2)
    steps, looked_at = compiled
    assert (steps, looked_at) == (["train"], [])
    saved = record(tmp_path)
    assert (saved["train"]["accumulation"], saved["model"]["remat"]) == (8, "none")
    assert "train: accumulation 8, remat none; no limit of memory is known" in caplog.text


@pytest.mark.parametrize(
    ("job", "platform", "asked", "rows", "want"),
    [
        ("train", "cpu", 0, 32, 8),
        ("train", "cpu", 0, 6, 1),
        ("train", "cpu", 0, 1, 1),
        ("train", "cpu", 2, 32, 2),
        ("posttrain", "cpu", 0, 32, 1),
        ("train", "gpu", 0, 32, 1),
    ],
)
def test_training_on_cpus_takes_small_microbatches(job, platform, asked, rows, want):
    config = toy.config()
    config[job].accumulation = asked
    with standing_in_for(platform):
        assert fitting.without_limit(config, job, rows) == (want, "none")


@pytest.mark.slow
def test_a_small_device_takes_microbatches_and_goes_on_with_them_bit_for_bit(
    tmp_path, trained, compiled, monkeypatch, caplog
):
    """8 steps at once, and 4 and then 4 of them: the second part finds more memory and keeps what it has."""
    steps, looked_at = compiled
    caplog.set_level(logging.INFO)
    limit(monkeypatch, 1e12)
    train(tmp_path / "large", trained, train__loop__steps=1)
    assert steps == ["train"]  # the program that was looked at is the one that runs
    small = 0.7 * looked_at[0] / fitting.USED
    limit(monkeypatch, small)
    steps.clear()
    train(tmp_path / "unbroken", trained)
    choice = fitting.Choice(record(tmp_path / "unbroken")["train"]["accumulation"], "none")
    assert choice.accumulation in (2, 4)
    assert looked_at[-1] <= fitting.USED * small
    assert len(steps) <= 3
    assert f"train: {choice}: 0.0 of 0.0 GiB" in caplog.text

    stop_after(monkeypatch, 4)
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path / "resumed", trained)
    monkeypatch.undo()
    limit(monkeypatch, 1e12)
    train(tmp_path / "resumed", trained)
    assert record(tmp_path / "resumed") == record(tmp_path / "unbroken")
    states = (toy.saved_state(tmp_path / name / "generator") for name in ("unbroken", "resumed"))
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)

    monkeypatch.setattr(loop, "compiled_step", None)
    train(tmp_path / "resumed", trained)  # is done, and compiles nothing


def stop_after(monkeypatch, last: int) -> None:
    """Ends a run once the checkpoint of a step is on disk."""
    save = Checkpoints.save

    def saving(self, step, state, record):
        save(self, step, state, record)
        if step == last:
            self.wait()
            raise RuntimeError("stopped")

    monkeypatch.setattr(Checkpoints, "save", saving)


@pytest.mark.slow
def test_a_choice_that_does_not_fit_any_more_is_made_anew(tmp_path, trained, compiled, monkeypatch, caplog):
    _, looked_at = compiled
    limit(monkeypatch, 1e12)
    train(tmp_path, trained, train__loop__steps=1)
    limit(monkeypatch, 0.7 * looked_at[0] / fitting.USED)
    train(tmp_path, trained, train__loop__steps=2)
    assert record(tmp_path)["train"]["accumulation"] > 1
    assert "the checkpoint's accumulation 1, remat none does not fit here: from now on numbers" in caplog.text


@pytest.mark.slow
def test_where_nothing_fits_one_line_says_what_helps(tmp_path, trained, monkeypatch):
    limit(monkeypatch, 1e5)
    with pytest.raises(
        RearError, match=r"^train: a device needs 0\.0 GiB with accumulation \d+, remat full, .*config\.mesh\.fsdp"
    ):
        train(tmp_path, trained)


@pytest.mark.slow
def test_the_compilers_refusal_counts_as_too_much(tmp_path, trained, monkeypatch):
    """A compiler that knows the device refuses a whole batch."""
    compiled_step = loop.compiled_step

    def refusing(learning, mesh):
        program = compiled_step(learning, mesh)
        if not refused:
            refused.append(learning)
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes.")
        return program

    refused = []
    monkeypatch.setattr(loop, "compiled_step", refusing)
    limit(monkeypatch, 1e12)
    train(tmp_path, trained, train__loop__steps=2)
    assert record(tmp_path)["train"]["accumulation"] == 2


@pytest.mark.slow
def test_post_training_takes_microbatches_too(tmp_path, trained, compiled, monkeypatch):
    steps, looked_at = compiled
    start = {"tokenizer_from": str(trained / "tokenizer"), "init_from": str(trained / "generator")}
    start |= {"posttrain__loop__steps": 1, "posttrain__loop__batch_size": 32, "posttrain__reward__perceptual": 0.0}
    limit(monkeypatch, 1e12)
    toy.run(tmp_path / "large", "posttrain", **start)
    limit(monkeypatch, 0.7 * looked_at[0] / fitting.USED)
    toy.run(tmp_path / "small", "posttrain", **start)
    assert record(tmp_path / "small", "posttrained")["posttrain"]["accumulation"] > 1
    assert len(steps) <= 4


def test_the_limit_is_that_of_the_smallest_device_of_this_process():
    @dataclasses.dataclass
    class Device:
        size: int | None

        def memory_stats(self):
            return self.size and {"bytes_limit": self.size}

    @dataclasses.dataclass
    class Mesh:
        local_devices: list

    assert fitting.memory_limit(Mesh([Device(7), Device(5)])) == 5
    assert fitting.memory_limit(Mesh([Device(None)])) is None
    assert jax.devices()[0].memory_stats() is None  # where this runs


@pytest.mark.slow
def test_what_a_tokenizers_backward_pass_computes_anew_changes_no_gradient(monkeypatch):
    """Beside one that keeps everything; what it saves is in the table of benchmarks/PLAN.md."""
    config = toy.config()
    networks, _ = vq.outline(config)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    norms = []
    for kept in (vq.KEPT, jax.checkpoint_policies.everything_saveable):
        monkeypatch.setattr(vq, "KEPT", kept)
        learning = vq.learning(config, networks, {}, {})
        _, metrics = jax.jit(learning.step)(learning.init({}), {"image": images}, jax.random.key(0), {})
        norms.append(float(metrics["gradient_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[1] > 0
