"""Plans for chips that are not here: the roofline, and the job; `test_hlo.py` has what is read from programs."""

import collections
import dataclasses
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.jobs import plan as job
from rear_jax.plan import chips, hlo, programs, report, roofline
from rear_jax.runtime.mesh import make_mesh, split
from rear_jax.training import fitting
from tests import toy

MESH = {"data": -1, "fsdp": 1, "tensor": 1}
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def made(fits: bool = True, **changes) -> roofline.Plan:
    """A plan of round numbers on eight chips: 1 ms of compute, 2 ms of memory, 0.5 ms of network."""
    chip = chips.Chip(flops=1e12, memory=8e9, bandwidth=1e12, network=1e9)
    topology = chips.Topology("v0:8", chip, [None] * 8, "nobody", True)
    values = {
        "name": "train",
        "topology": topology,
        "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
        "images": 16,
        "calls": 100,
        "held": {"parameters": 10**9},
        "working": 2 * 10**9,
        "fits": fits,
        "model_flops": 4 * 10**9,
        "flops": {"bfloat16": 8 * 10**9},
        "moved": 2 * 10**9,
        "collectives": [hlo.Collective("all-gather", 10**6, 2, 1, reach=2)],
        "cycles": 0,
        "kernel_cycles": 0,
        "seconds": 1.0,
    }
    return roofline.Plan(**values | changes)


class TestRoofline:
    def test_the_slowest_of_three_bounds(self):
        plan = made()
        assert plan.bounds == pytest.approx({"compute": 1e-3, "memory": 2e-3, "network": 0.5e-3})
        assert plan.bound == pytest.approx(2e-3)
        assert plan.mfu(plan.bound) == pytest.approx(0.25)  # half of the FLOPs are the model's, half of the time waits
        assert plan.seconds_at(0.5) == pytest.approx(1e-3)

    def test_float32_takes_as_long_as_its_precision_wants(self):
        seconds = {
            kind: made(flops={kind: 8 * 10**9}).bounds["compute"] for kind in ("bfloat16", "default", "high", "highest")
        }
        assert seconds == pytest.approx({"bfloat16": 1e-3, "default": 1e-3, "high": 3e-3, "highest": 6e-3})
        a100 = chips.GPUS["a100"].float32
        assert (a100["high"], a100["highest"]) == (2, 16)  # 156 and 19.5 TFLOP/s of 312

    def test_the_recipe(self):
        config = toy.config(plan__epoch_images=1600, plan__mfu=0.5)
        rows = {row[0]: row[1:] for row in report.recipe(made(), config)}
        assert rows["a step"] == ("2 ms", "1 ms")
        assert "at an MFU of 50 %, beyond the bound" in report.markdown(made(), config, None)
        assert rows["epochs a day"] == ("4.32e+05", "8.64e+05")  # an epoch is 100 steps
        assert float(rows["chip-hours"][0]) == pytest.approx(100 * 2e-3 * 8 / 3600, rel=1e-3)

    def test_the_cost_model_stands_beside_the_bound(self):
        """10 ms, of which kernels take 4; a chip whose clock is not known has none."""
        chip = dataclasses.replace(made().topology.chip, clock=1e9)
        plan = made(topology=dataclasses.replace(made().topology, chip=chip), cycles=10**7, kernel_cycles=4 * 10**6)
        work = dict(report.work(plan))
        assert work["by the compiler's cost model"] == "10 ms, of which kernels 4 ms by their formulas: an MFU of 5.0 %"
        config = toy.config(plan__mfu=0.5)
        assert {row[0]: row[1:] for row in report.recipe(plan, config)}["a step"] == ("2 ms", "10 ms", "1 ms")
        assert "| the recipe | at the bound | by the cost model | at an MFU of 50 %" in report.markdown(
            plan, config, None
        )
        numbers = report.numbers(plan, None)
        assert (numbers["modelled"], numbers["mfu_modelled"]) == pytest.approx((1e-2, 0.05))
        assert (numbers["cycles"], numbers["kernel_cycles"]) == (10**7, 4 * 10**6)
        for unknown in (made(cycles=10**7), made()):
            assert "cost model" not in report.markdown(unknown, config, None)
            assert report.numbers(unknown, None)["mfu_modelled"] is None

    def test_only_between_nodes_the_network_is_slower(self):
        """Sixteen chips in two nodes: tensor parallelism in each, gradients across."""
        topology = chips.Topology("", chips.GPUS["h100"], [None] * 16, "", False)
        inside = hlo.Collective("all-gather", 9 * 10**9, 8, 1, reach=8)
        across = hlo.Collective("all-reduce", 10**9, 2, 1, reach=16)
        bounds = made(topology=topology, collectives=[inside, across]).bounds
        assert bounds["network"] == pytest.approx(9e9 * 7 / 8 / 450e9 + 1e9 / 50e9)

    def test_a_program_that_could_not_be_compiled(self):
        """What it needs is known, or else the compiler's words stand."""
        held = {"parameters": jax.ShapeDtypeStruct((2**28,), jnp.float32, sharding=HERE)}  # 1 GiB
        program = programs.Program(None, (), held, images=1, calls=1)
        taken = roofline._overflow(roofline.Compiled(toy.config(), program, None, 17 * 2**30))
        assert taken["working"] == 16 * 2**30
        assert not taken["fits"]
        error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no more")
        with pytest.raises(jax.errors.JaxRuntimeError, match="no more"):
            roofline._overflow(roofline.Compiled(toy.config(), program, None, math.inf, error))


def test_arguments_and_temporaries_must_fit_together():
    """The compiler itself refuses a program only where the latter alone do not."""
    topology = chips.topology("h100:1")
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split(make_mesh(MESH, topology.devices)))
    function = jax.jit(lambda x: jnp.linalg.norm(x @ x @ x))
    compiled = function.lower(x).compile()
    program = programs.Program(function, (x,), {"parameters": x}, images=1, calls=1)
    taken = roofline._taken(compiled, program, topology, quick=False)
    needed = sum(taken["held"].values()) + taken["working"]
    assert needed > taken["held"]["parameters"] == 64 * 64 * 4
    for spare, fits in ((0, True), (-1, False)):
        chip = dataclasses.replace(topology.chip, memory=needed + spare)
        assert roofline._taken(compiled, program, dataclasses.replace(topology, chip=chip), quick=False)["fits"] is fits


def test_a_plan_that_does_not_fit_says_what_helps():
    text = report.markdown(made(fits=False, moved=None, collectives=[]), toy.config(), (8, 16))
    assert "**A step of 16 images does not fit.** The largest that was found to fit: 8; 16 does not." in text
    assert "What helps: more train.accumulation, model.remat, config.mesh.fsdp" in text
    assert "by compute" in text  # all that is known without a program


@pytest.mark.parametrize("per_row", [1e6, 3.3e7, 5e8, 9e9])
def test_the_largest_batch_is_found_in_few_compiles(monkeypatch, per_row):
    """On a chip of 8e9 bytes of which 1e9 are held."""
    asked = []

    def fake(config, name, topology, quick=False):
        rows = config.train.loop.batch_size // 8
        asked.append(rows)
        return made(images=8 * rows, working=int(rows * per_row), fits=1e9 + rows * per_row <= 8e9)

    monkeypatch.setattr(roofline, "make", fake)
    config = toy.config()
    config.train.loop.batch_size = 16
    first = fake(config, "train", None)
    fitting, failing = roofline.largest_batch(config, first, 12)
    most = int(7e9 / per_row)
    assert fitting // 8 <= most < failing // 8
    assert fitting // 8 >= 0.88 * most
    assert len(asked) == len(set(asked)) <= 13


@pytest.mark.parametrize("name", ["", "v5e", "v9:4x4", "v5e:4x", "h100:0", "rtx:8"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(RearError, match=r"config\.plan\.topology = .* is none: give a chip of v4, .*h100:8"):
        chips.topology(name)


def test_a_slice_that_is_too_large_is_refused():
    with pytest.raises(RearError, match=r"'v5e:32x16': a slice of v5e has at most 256 chips"):
        chips.topology("v5e:32x16")


def test_a_mesh_or_batch_that_does_not_fit_is_refused():
    topology = chips.topology("h100:8")
    with pytest.raises(RearError, match=r"config\.mesh .* does not fit 8 device"):
        roofline.make(toy.config(mesh__fsdp=3), "train", topology)
    with pytest.raises(RearError, match=r"config\.train\.loop\.batch_size = 12 does not divide .* 8 *device"):
        roofline.make(toy.config(train__loop__batch_size=12), "train", topology)


def test_an_unknown_program_is_refused(tmp_path):
    config = toy.config(plan__topology="h100:8", plan__programs=("tokenize",))
    with pytest.raises(RearError, match=r"config\.plan\.programs = 'tokenize': use some of tokenizer, train"):
        job.run(config, tmp_path)


def sixteen_chips(monkeypatch, **changes):
    """A toy config on sixteen chips for which nothing is compiled, and the names of what would have been."""
    compiled = []

    def fake(config, name, topology, quick=False):
        compiled.append(name)
        return made(name=name, images=programs.setting(config, programs.BATCH_SIZES[name]))

    monkeypatch.setattr(roofline, "make", fake)
    changes = {"plan__topology": "h100:16", "plan__compiles": 0, "train__loop__batch_size": 16} | changes
    changes = {"tokenizer_training__loop__batch_size": 16} | changes
    return toy.config(**changes), compiled


def test_sampling_that_nobody_asked_for_is_planned_at_a_batch_that_divides(tmp_path, monkeypatch):
    """The README's command: 16 chips, a batch of 8 images, no config.plan.programs."""
    config, compiled = sixteen_chips(monkeypatch)
    assert config.sample.batch_size == 8
    job.run(config, tmp_path)
    assert compiled == ["tokenizer", "train", "sample"]
    text = (tmp_path / "plan.md").read_text()
    assert "config.sample.batch_size = 8 does not divide over the chips: more are drawn at once." in text
    planned = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert {name: plan["images"] for name, plan in planned.items()} == {"tokenizer": 16, "train": 16, "sample": 16}


def test_a_batch_that_divides_stays_what_it_is(tmp_path, monkeypatch):
    config, _ = sixteen_chips(monkeypatch, sample__batch_size=48)
    job.run(config, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text())["programs"]["sample"]["images"] == 48
    assert "does not divide" not in (tmp_path / "plan.md").read_text()


def test_batches_are_checked_before_anything_is_compiled(tmp_path, monkeypatch):
    config, compiled = sixteen_chips(monkeypatch, plan__programs=("train", "sample"))
    with pytest.raises(RearError, match=r"config\.sample\.batch_size = 8 does not divide .* 16 device"):
        job.run(config, tmp_path)
    assert not compiled


def test_a_plan_is_written_after_each_program(tmp_path, monkeypatch):
    """What was compiled is not lost with what comes after it."""
    config, _ = sixteen_chips(monkeypatch)
    fake = roofline.make

    def broken(config, name, *arguments, **options):
        if name == "sample":
            raise RearError("no")
        return fake(config, name, *arguments, **options)

    monkeypatch.setattr(roofline, "make", broken)
    with pytest.raises(RearError, match="no"):
        job.run(config, tmp_path)
    assert set(json.loads((tmp_path / "plan.json").read_text())["programs"]) == {"tokenizer", "train"}
    assert "## train" in (tmp_path / "plan.md").read_text()


def test_held_bytes_are_those_of_the_state():
    """Parameters and both Adam moments in float32, all but what is small divided by four."""
    config = toy.config(mesh__fsdp=4, train__ema_decay=0.9)
    mesh = make_mesh(config.mesh, chips.topology("h100:4").devices)
    program = programs.train(config, mesh)
    held = roofline.held_bytes(program)
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(program.held["parameters"]))
    assert whole / 4 <= held["parameters"] < whole / 2
    assert held["moving average"] == held["parameters"]
    assert held["optimiser"] == pytest.approx(2 * held["parameters"], abs=64)
    assert held["batch"] == config.train.loop.batch_size // 4 * (program.held["batch"]["codes"].shape[1] + 1) * 4


@pytest.mark.slow
def test_the_job_without_the_chips_compiler(tmp_path, monkeypatch):
    """No TPU compiler: the host's stands in, and the plan says so; nothing but shapes is needed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = toy.llamagen_config(remat="full")
    config.plan.update({"topology": "v5e:2x2", "compiles": 0, "programs": ("train",)})
    job.run(config, tmp_path)
    text = (tmp_path / "plan.md").read_text()
    assert "## train on v5e:2x2: 4 chip(s), data 4" in text
    assert "libtpu is not installed" in text
    assert "Attention is in its plain form" in text
    found = json.loads((tmp_path / "plan.json").read_text())["programs"]["train"]
    assert found["fits"]
    operations = sum(found["flops"].values())
    assert 0 < found["model_flops"] < operations <= 4 / 3 * found["model_flops"]  # layers are computed again
    assert found["bound"] == max(found["bounds"].values()) > 0
    mesh = make_mesh(config.mesh, chips.topology("h100:4").devices)
    paths = jax.tree_util.tree_leaves_with_path(programs.train(config, mesh).held["parameters"])
    kernels = sum(4 * leaf.size for path, leaf in paths if path[-1].key == "kernel")
    whole = sum(4 * leaf.size for _, leaf in paths)
    sizes = collections.Counter()
    for one in found["collectives"]:
        sizes[one["kind"]] += one["times"] * one["size"]
    assert kernels <= sizes["all-reduce"] <= 2 * whole  # the gradients of all devices
    assert kernels <= sizes["all-gather"] <= 1.1 * whole  # the parameters, once: each device keeps a part of them
    assert found["held"]["parameters"] < 1.05 * whole / 4


@pytest.mark.slow
def test_the_command_of_the_readme_on_more_chips_than_images(tmp_path):
    """Sixteen chips, batches of 16 and 8 images, no config.plan.programs: all of it compiled."""
    batches = {"train__loop__batch_size": 16, "tokenizer_training__loop__batch_size": 16}
    job.run(toy.config(plan__topology="h100:16", plan__compiles=0, **batches), tmp_path)
    planned = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert {name: plan["images"] for name, plan in planned.items()} == {"tokenizer": 16, "train": 16, "sample": 16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer", "posttrain", "sample"])
def test_the_other_programs(tmp_path, name):
    config = toy.config(plan__topology="a100:2", plan__compiles=1, plan__programs=(name,), sample__batch_size=8)
    job.run(config, tmp_path)
    found = json.loads((tmp_path / "plan.json").read_text())["programs"][name]
    assert found["moved"] > 0
    assert found["largest_batch"][0] > found["images"]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"tensor": 2}])
def test_held_bytes_are_those_that_the_compiler_counts(mesh):
    plan = roofline.make(
        toy.config(**{f"mesh__{axis}": size for axis, size in mesh.items()}), "train", chips.topology("h100:4")
    )
    assert plan.held.pop("layout") <= 0.01 * sum(plan.held.values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:1x1"])
def test_with_the_tpu_compiler(name):
    topology = chips.topology(name)
    assert len(topology.devices) == math.prod(map(int, name.split(":")[1].split("x")))
    config = toy.config(mesh__fsdp=2 if len(topology.devices) > 1 else 1)
    plan = roofline.make(config, "train", topology)
    assert plan.fits
    assert plan.cycles > 0
    assert topology.exact
    assert np.isfinite(plan.bound)
    kinds = {one.kind for one in plan.collectives}
    assert (kinds >= {"all-reduce"}) == (len(topology.devices) > 1)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_with_the_tpu_compiler_kernels_count():
    """Their cycles by their formulas; their operations as they run: backward computes the scores twice more."""
    topology = chips.topology("v5e:2x2")
    sizes = {"dtype": "bfloat16", "remat": "none", "dropout": 0.0, "token_dropout": 0.0}
    fused, plain = (
        roofline.make(toy.llamagen_config(attention=kernel, **sizes), "train", topology) for kernel in ("auto", "plain")
    )
    assert fused.cycles > fused.kernel_cycles > 0 == plain.kernel_cycles
    assert fused.notes == ()
    assert sum(fused.flops.values()) > fused.model_flops == plain.model_flops == sum(plain.flops.values())


@pytest.mark.slow
def test_what_is_open_is_chosen_for_the_chip(tmp_path, monkeypatch):
    """As a run chooses it: a chip that is too small for the batch takes microbatches; the plan says so."""
    config = toy.config(plan__topology="a100:1", plan__compiles=0, plan__programs=("train",), method__name="ar")
    config.train.loop.batch_size = 32
    whole = roofline.compile_fitting(config, "train", chips.topology("a100:1"))
    assert (whole.config.train.accumulation, whole.config.model.remat) == (1, "none")
    small = dataclasses.replace(chips.GPUS["a100"], memory=0.7 * whole.needed / fitting.USED)
    monkeypatch.setitem(chips.GPUS, "a100", small)
    job.run(config, tmp_path)
    planned = json.loads((tmp_path / "plan.json").read_text())["programs"]["train"]
    assert (planned["accumulation"] > 1, planned["fits"]) == (True, True)
    text = (tmp_path / "plan.md").read_text()
    assert f"to stay within 95 % of the memory: accumulation {planned['accumulation']}, remat none.**" in text
