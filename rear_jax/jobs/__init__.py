"""Jobs: one file each, with a `check` and a `run(config, workdir)` that reads top to bottom."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from rear_jax.config import downloads
from rear_jax.config.ranges import checked
from rear_jax.data.sources import forget_splits, with_class_count
from rear_jax.errors import RearError
from rear_jax.jobs import (
    analyze,
    caption,
    convert,
    demo,
    describe,
    evaluate,
    import_codes,
    inspect_data,
    plan,
    posttrain,
    sample,
    show,
    study,
    sweep,
    tokenize,
    tokenizer,
    train,
)
from rear_jax.jobs.job import Job
from rear_jax.runtime import command_line, distributed, lock, places, trackers
from rear_jax.runtime.atomic import write_json
from rear_jax.sampling.conditions import scored

log = logging.getLogger(__name__)

JOBS: dict[str, Job] = {
    "tokenizer": Job(tokenizer.run, tokenizer.check, shared=True, leaves=("tokenizer", "reconstructions.png")),
    "tokenize": Job(tokenize.run, tokenize.check, shared=True, leaves=("codes/header.json",)),
    "caption": Job(caption.run, caption.check, shared=True, leaves=("captions",)),
    "describe": Job(describe.run, describe.check, counts_classes=False, leaves=("descriptions",)),
    "import": Job(import_codes.run, import_codes.check, leaves=("codes/header.json",)),
    "train": Job(train.run, train.check, shared=True, leaves=("generator",)),
    "posttrain": Job(
        posttrain.run, posttrain.check, shared=True, leaves=("posttrained", "posttrained_decoder", "posttrain.png")
    ),
    "sample": Job(sample.run, sample.check, shared=True, leaves=("samples.npz", "samples.png", "samples.json")),
    "evaluate": Job(evaluate.run, evaluate.check, leaves=("report.md", "report.html", "scores.json")),
    "analyze": Job(analyze.run, analyze.check, leaves=("analyze.md", "analyze.html")),
    "sweep": Job(sweep.run, sweep.check, leaves=("sweep.md", "sweep.html", "sweep.png")),
    "convert": Job(convert.run, convert.check, leaves=("converted",)),
    "inspect": Job(
        inspect_data.run,
        inspect_data.check,
        locks=False,
        counts_classes=False,
        leaves=("inspect.md", "inspect.html", "inspect.json"),
    ),
    "plan": Job(plan.run, plan.check, locks=False, leaves=("plan.md",)),
}
_OTHERS = dict(JOBS)  # which 'study' runs
JOBS["demo"] = Job(demo.run, demo.check, locks=False)
JOBS["study"] = Job(
    functools.partial(study.run, jobs=_OTHERS),
    functools.partial(study.check, jobs=_OTHERS),
    leaves=("study.md", "study.html", "study.png"),
)
JOBS["show"] = Job(functools.partial(show.run, jobs=dict(JOBS)), show.check, locks=False, counts_classes=False)


def check_all(names: Sequence[str], config: ConfigDict, workdir: Path) -> ConfigDict:
    """Checks jobs that are to run in turn, each for what can be known before the first of them.

    Returns:
      The settings that they run by: those of `config`, with the number of classes where that is asked of the images,
      and with files on disk in the place of those of a hub.

    Raises RearError: there is no job, a name is unknown, a job is not for several processes, a setting is out of its
      range, a file of a hub cannot be fetched, or a check refuses.
    """
    if not names:
        raise RearError(f"no job to run: name some of {', '.join(JOBS)}.")
    for name in names:
        if name not in JOBS:
            raise RearError(f"unknown job {name!r}: use {', '.join(JOBS)}.")
        if jax.process_count() > 1 and not JOBS[name].shared:
            shared = ",".join(other for other, job in JOBS.items() if job.shared)
            raise RearError(f"--job={name} runs in one process: run it on one host, after --job={shared}.")
    forget_splits()
    config = _of(names, config)
    places.limit_cache(config.buckets.cache_gb)
    if any(JOBS[name].counts_classes for name in names):
        config = checked(with_class_count(config))
    distributed.agree("jobs, config or workdir", f"{names} {config.to_json_best_effort()} {workdir}")
    config = downloads.fetched(config)
    for place, name in enumerate(names):
        JOBS[name].check(config, workdir, tuple(names[:place]))
    return config


def _of(names: Sequence[str], config: ConfigDict) -> ConfigDict:
    """The settings of a command that runs these jobs, in their ranges; a set that 'evaluate' scores has its size."""
    return scored(checked(config)) if "evaluate" in names else checked(config)


def run_all(names: Sequence[str], config: ConfigDict, workdir: Path) -> None:
    """Checks all jobs, then runs them in turn; no process begins with one before all have ended the one before it.

    Raises RearError: as `check_all`; another process works in `workdir`; besides, whatever the jobs raise.
    """
    config = _of(names, config)
    locks = jax.process_count() > 1 or any(name in JOBS and JOBS[name].locks for name in names)
    try:
        with lock.held(workdir) if locks else contextlib.nullcontext():
            config = check_all(names, config, workdir)
            if locks and distributed.is_first():
                command_line.introduce()
                write_json(workdir / "config.json", config.to_dict())
            with trackers.tracking(config.writers, workdir, config.to_dict()):
                for name in names:
                    JOBS[name].run(config, workdir)
                    distributed.wait(name)
                    _say_where_to_look(name, workdir)
    except JaxRuntimeError as error:
        if jax.process_count() == 1 or str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise distributed.lost(error) from error


def _say_where_to_look(name: str, workdir: Path) -> None:
    """The last line of a job in the log."""
    if found := JOBS[name].found(workdir):
        curves = f"; curves: tensorboard --logdir={workdir / 'tensorboard'}" if name in show.TRAINED_BY else ""
        log.info("%s: done. See %s%s", name, ", ".join(map(str, found)), curves)
