"""The published sizes fit the machines of their papers: the table of benchmarks/PLAN.md, compiled again."""

import importlib.util

import jax
import pytest

from rear_jax.plan import chips, programs, roofline
from rear_jax.runtime.mesh import make_mesh
from rear_jax.training import fitting
from tests import toy

# for two CPU cores
SMALL = (
    "fashion_alitok",
    "fashion_titok",
    "fashion_t2i",
    "freedoom",
    "quickstart",
    "study_freedoom",
    "study_rear",
    "study_scaling",
    "study_va_pi",
)

_SPEC = importlib.util.spec_from_file_location("published", toy.ROOT / "benchmarks" / "published.py")
published = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(published)


def named(row: published.Row) -> str:
    return f"{row.program} {row.configs[0]}"


def test_every_published_size_is_in_the_table():
    """With its job's program, and all but tokenizers with sampling."""
    table = {(row.program, config.partition(":")[0]) for row in published.rows("a100:8") for config in row.configs}
    for file in (toy.ROOT / "configs").glob("*.py"):
        if file.stem not in SMALL:
            wanted = {"tokenizer"} if file.stem.startswith("tokenizer_") else {"sample"}
            jobs = {job for row in published.rows("a100:8") for job in [row.program]} & set(
                published.load(file.stem).jobs
            )
            assert {(program, file.stem) for program in wanted | jobs} <= table, file.stem


@pytest.mark.parametrize("topology", ["a100:8", "v5e:16x16", "v5e:4x4"])
def test_the_tables_are_written_as_they_are_read(topology):
    text = (toy.ROOT / "benchmarks" / "PLAN.md").read_text()
    for row in published.rows(topology):
        config = published.load(row.configs[0])
        config.update_from_flattened_dict(row.settings)
        if row.program in fitting.JOBS:
            config = fitting.applied(config, row.program, row.choice)
        found = roofline.Compiled(config, None, None, row.gib * chips.GIB)
        assert published.written(row, found) in text


def check(row: published.Row, name: str) -> None:
    """It takes no more than the table says, and no more than a device has."""
    topology = chips.topology(name)
    found = published.compiled(row, topology, row.choice)
    assert programs.setting(found.config, programs.BATCH_SIZES[row.program]) == row.images
    assert found.needed <= fitting.USED * topology.chip.memory
    assert found.needed / chips.GIB < 1.1 * row.gib


def rows_to_test(topology: str) -> list[published.Row]:
    """All rows but those of sampling that take less than the largest of them, a third of what there is."""
    found = published.rows(topology)
    most = max(row.gib for row in found if row.program == "sample")
    assert most < 0.35 * chips.GPUS["a100"].memory / chips.GIB
    return [row for row in found if row.program != "sample" or row.gib == most]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_to_test("a100:8"), ids=named)
def test_the_published_sizes_fit_eight_a100(row):
    """By the compiler of the host. One compilation a row: that of the choice which a run makes by itself."""
    check(row, "a100:8")


@pytest.mark.slow
def test_that_choice_is_made():
    """2048 images of reAR-B: eight microbatches of 32 images a GPU, as four would take 73 of 74.5 GiB."""
    chosen = roofline.compile_fitting(published.load("rear_b"), "train", chips.topology("a100:8"))
    (row,) = (row for row in published.rows("a100:8") if row.configs[0] == "rear_b" and row.program == "train")
    assert (chosen.config.train.accumulation, chosen.config.model.remat) == row.choice


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("config", ["rear_b"])
def test_with_the_tpu_compiler_a_published_size_fits(config):
    (row,) = (row for row in published.rows("v5e:16x16") if row.configs[0] == config and row.program == "train")
    check(row, "v5e:16x16")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("program", "config"),
    [
        ("train", "rear_b"),
        ("train", "alitok_b"),
        ("train", "llamagen_l"),
        ("posttrain", "va_pi_rear_b"),
        ("posttrain", "va_pi_llamagen_t2i_xl"),
        ("sample", "alitok_b"),
    ],
)
def test_for_the_tpu_compiler_every_family_is_traced_on_several_chips(program, config):
    """With the kernels that TPUs take, which divide themselves over the mesh. Nothing is compiled."""
    topology, given = chips.topology("v5e:4x4"), published.load(config)
    given.mesh.update(data=-1, fsdp=2, tensor=2)
    mesh = make_mesh(given.mesh, topology.devices)
    planned = programs.PROGRAMS[program](given, mesh)
    with jax.set_mesh(mesh):
        text = planned.function.lower(*planned.arguments).as_text()
    assert ("tpu_custom_call" in text) == (program != "sample")
