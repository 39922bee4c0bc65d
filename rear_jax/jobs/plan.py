"""`--job=plan`: what training, post-training and sampling would take on chips that are not here."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.atomic import atomic_file
from rear_jax.errors import RearError
from rear_jax.plan import chips, report, roofline
from rear_jax.plan.programs import PROGRAMS

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Compiles the config's programs for `config.plan.topology`, and writes `plan.md` and `plan.json`.

    It needs no data and no weights.
    """
    settings, topology = config.plan, chips.topology(config.plan.topology)
    texts, numbers = [], {}
    for name in _names(config):
        plan = roofline.make(config, name, topology, quick=settings.quick)
        largest = roofline.largest_batch(config, plan, settings.compiles) if settings.compiles else None
        texts.append(report.markdown(plan, config, largest))
        numbers[name] = report.numbers(plan, largest)
        log.info("plan:\n%s", texts[-1])
    artifacts.write_json(workdir / "plan.json", {"programs": numbers, "config": config.to_dict()})
    with atomic_file(workdir / "plan.md") as file:
        file.write_text("\n".join(texts))
    log.info("plan: wrote %s", workdir / "plan.md")


def _names(config: ConfigDict) -> list[str]:
    """The programs that are asked for: those of `config.plan.programs`, else those of the config's jobs and sampling.

    Raises:
      RearError: there is no such program.
    """
    names = list(config.plan.programs) or [name for name in PROGRAMS if name in (*config.jobs, "sample")]
    if unknown := [name for name in names if name not in PROGRAMS]:
        raise RearError(f"config.plan.programs = {unknown[0]!r}: use some of {', '.join(PROGRAMS)}.")
    return names
