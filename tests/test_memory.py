"""The published sizes fit the machines of their papers: the table of benchmarks/PLAN.md, compiled again."""

import importlib.util
import re
from typing import NamedTuple

import pytest

from rear_jax.plan import chips, programs, roofline
from rear_jax.training import fitting
from tests import toy

SMALL = ("fashion_alitok", "fashion_titok", "quickstart", "study_va_pi")  # for two CPU cores
GIB = 2**30


class Row(NamedTuple):
    """One row of the table; the first config was compiled, the others have its network or a smaller one.

    `gib` is None where it was not measured.
    """

    program: str
    configs: list[str]
    batch: int
    choice: fitting.Choice
    gib: float | None


def rows(topology: str) -> list[Row]:
    """The rows of the table for a topology."""
    text = (toy.ROOT / "benchmarks" / "PLAN.md").read_text()
    (table,) = re.findall(rf"^## The published sizes on {topology}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in programs.PROGRAMS:
            program, configs, batch, accumulation, remat, gib = cells
            choice = fitting.Choice(int(accumulation or 1), remat or "none")
            size = float(gib) if gib else None
            found.append(Row(program, re.findall(r"`([\w:]+)`", configs), int(batch), choice, size))
    return found


def load(name: str):
    """A file of configs/, with its argument behind a colon."""
    name, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(name, toy.ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([argument] if argument else []))


def named(row: Row) -> str:
    return f"{row.program} {row.configs[0]}"


def test_every_published_size_is_in_the_table():
    """With its job's program, and all but tokenizers with sampling."""
    table = {(row.program, config.partition(":")[0]) for row in rows("a100:8") for config in row.configs}
    for file in (toy.ROOT / "configs").glob("*.py"):
        if file.stem not in SMALL:
            wanted = {"tokenizer"} if file.stem.startswith("tokenizer_") else {"sample"}
            jobs = {job for row in rows("a100:8") for job in [row.program]} & set(load(file.stem).jobs)
            assert {(program, file.stem) for program in wanted | jobs} <= table, file.stem


def compiled(row: Row, topology: str) -> roofline.Compiled:
    """The program of a row with the choice that it names."""
    config = load(row.configs[0])
    if row.program in fitting.JOBS:
        assert fitting.is_open(config, row.program)
        config = fitting.applied(config, row.program, row.choice)
    assert programs.setting(config, programs.BATCH_SIZES[row.program]) == row.batch
    return roofline.compile_fitting(config, row.program, chips.topology(topology), quick=True)


def check(row: Row, topology: str) -> None:
    """It takes no more than the table says, if it does, and no more than a device has."""
    needed = compiled(row, topology).needed
    assert needed <= fitting.USED * chips.topology(topology).chip.memory
    assert row.gib is None or needed / GIB < 1.1 * row.gib


def rows_to_test(topology: str) -> list[Row]:
    """All rows but those of sampling that take less than the largest of them, a fifth of what there is."""
    found = rows(topology)
    most = max(row.gib for row in found if row.program == "sample")
    assert most < 0.2 * chips.GPUS["a100"].memory / GIB
    return [row for row in found if row.program != "sample" or row.gib == most]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_to_test("a100:8"), ids=named)
def test_the_published_sizes_fit_eight_a100(row):
    """By the compiler of the host. One compilation a row: that of the choice which a run makes by itself."""
    check(row, "a100:8")


@pytest.mark.slow
def test_that_choice_is_made():
    """2048 images of reAR-B: eight microbatches of 32 images a GPU, as four would take 73 of 74.5 GiB."""
    chosen = roofline.compile_fitting(load("rear_b"), "train", chips.topology("a100:8"))
    (row,) = (row for row in rows("a100:8") if row.configs[0] == "rear_b" and row.program == "train")
    assert (chosen.config.train.accumulation, chosen.config.model.remat) == row.choice


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("config", ["rear_b"])
def test_with_the_tpu_compiler_a_published_size_fits(config):
    (row,) = (row for row in rows("v5e:16x16") if row.configs[0] == config and row.program == "train")
    check(row, "v5e:16x16")
