"""Memory of every published size on a machine, with what a run chooses there: a table of benchmarks/PLAN.md, anew.

python benchmarks/published.py a100:8
python benchmarks/published.py v5e:16x16 [train ...]

Each row of the page's table is planned again: the program of its first config, with the settings of the row. Programs
may be named, else all rows are planned. A topology of TPUs needs jax[tpu]. A row takes half a minute to two minutes.
"""

import argparse
import ast
import importlib.util
import pathlib
import re
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rear_jax.plan import chips, programs, roofline
from rear_jax.training import fitting

ROOT = pathlib.Path(__file__).parent.parent
HEAD = "| program | configs | settings | images | accumulation | remat | GiB |\n|---|---|---|---|---|---|---|"


class Row(NamedTuple):
    """One row of a table: the first config is compiled, the others have its network or a smaller one."""

    program: str
    configs: list[str]
    settings: dict[str, Any]
    images: int
    choice: fitting.Choice
    gib: float


def rows(topology: str) -> list[Row]:
    """The rows of the page's table for a topology."""
    text = (ROOT / "benchmarks" / "PLAN.md").read_text()
    (table,) = re.findall(rf"^## The published sizes on {topology}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    found = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in programs.PROGRAMS:
            program, configs, settings, images, accumulation, remat, gib = cells
            names = re.findall(r"`([\w:]+)`", configs)
            given = {name: ast.literal_eval(value) for name, value in re.findall(r"`([\w.]+)=(\S+)`", settings)}
            choice = fitting.Choice(int(accumulation or 1), remat or "none")
            found.append(Row(program, names, given, int(images), choice, float(gib)))
    return found


def load(name: str) -> ConfigDict:
    """A file of configs/, with its argument behind a colon."""
    name, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([argument] if argument else []))


def compiled(row: Row, topology: chips.Topology, choice: fitting.Choice | None = None) -> roofline.Compiled:
    """The program of a row, with a choice or with what a run chooses."""
    config = load(row.configs[0])
    config.update_from_flattened_dict(row.settings)
    if choice is not None and row.program in fitting.JOBS:
        config = fitting.applied(config, row.program, choice)
    return roofline.compile_fitting(config, row.program, topology, quick=True)


def written(row: Row, found: roofline.Compiled) -> str:
    """A row of the table."""
    chosen = row.program in fitting.JOBS
    cells = (
        row.program,
        ", ".join(f"`{config}`" for config in row.configs),
        ", ".join(f"`{name}={value}`" for name, value in row.settings.items()),
        programs.setting(found.config, programs.BATCH_SIZES[row.program]),
        programs.microbatches_of(found.config, row.program) if chosen else "",
        found.config.model.remat if chosen else "",
        f"{found.needed / chips.GIB:.1f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topology")
    parser.add_argument("programs", nargs="*")
    arguments = parser.parse_args()
    topology = chips.topology(arguments.topology)
    print(HEAD)
    for row in rows(arguments.topology):
        if not arguments.programs or row.program in arguments.programs:
            print(written(row, compiled(row, topology)), flush=True)


if __name__ == "__main__":
    main()
