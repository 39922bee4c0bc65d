"""`--job=plan`: what every kind of training and sampling would take on chips that are not here."""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.plan import chips, programs, report, roofline
from rear_jax.runtime.atomic import atomic_file, write_json
from rear_jax.runtime.mesh import make_mesh

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Compiles the config's programs for `config.plan.topology`, and writes `plan.md` and `plan.json` after each.

    It needs no data and no weights.

    Raises RearError: there is no such program, or the chips do not divide the batch of one that is asked for.
    """
    settings, topology = config.plan, chips.topology(config.plan.topology)
    texts, numbers = [], {}
    for name, (planned, notes) in _planned(config, len(topology.devices)).items():
        plan = roofline.make(planned, name, topology, quick=settings.quick)
        plan = dataclasses.replace(plan, notes=(*notes, *plan.notes))
        largest = roofline.largest_batch(planned, plan, settings.compiles) if settings.compiles else None
        texts.append(report.markdown(plan, planned, largest))
        numbers[name] = report.numbers(plan, largest)
        log.info("plan:\n%s", texts[-1])
        write_json(workdir / "plan.json", {"programs": numbers, "config": config.to_dict()})
        with atomic_file(workdir / "plan.md") as file:
            file.write_text("\n".join(texts))
    log.info("plan: wrote %s", workdir / "plan.md")


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    devices = chips.topology(config.plan.topology).devices
    for name, (planned, _) in _planned(config, len(devices)).items():
        programs.PROGRAMS[name](planned, make_mesh(config.mesh, devices))


def _planned(config: ConfigDict, chips: int) -> dict[str, tuple[ConfigDict, tuple[str, ...]]]:
    """Name of each program -> the config to plan it by, and what the plan is to say of it.

    Sampling that nobody asked for is planned at the next batch that the chips divide; any other batch must be one.

    Raises RearError: see `run`.
    """
    planned = {}
    for name in _names(config):
        notes, fitting = (), config
        if name == "sample" and name not in config.plan.programs:
            asked, fitting = config.sample.batch_size, programs.with_divisible_batch(config, name, chips)
            if asked != fitting.sample.batch_size:
                notes = (f"config.sample.batch_size = {asked} does not divide over the chips: more are drawn at once.",)
        programs.check(fitting, name, chips)
        planned[name] = fitting, notes
    return planned


def _names(config: ConfigDict) -> list[str]:
    """The programs that are asked for: those of `config.plan.programs`, else of the config's jobs, and sampling.

    Sampling goes with every job but that of a tokenizer.

    Raises RearError: there is no such program.
    """
    known = dict(programs.PROGRAMS)
    if config.text.on_the_fly:
        del known["caption"]  # a part of the steps
    asked = (*config.jobs, *(() if set(config.jobs) == {"tokenizer"} else ("sample",)))
    names = list(config.plan.programs) or [name for name in known if name in asked]
    if unknown := [name for name in names if name not in known]:
        raise RearError(f"config.plan.programs = {unknown[0]!r}: use some of {', '.join(known)}.")
    return names
