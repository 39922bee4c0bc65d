"""Jobs: one file each, with a `check` and a `run(config, workdir)` that reads top to bottom."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from rear_jax.config.ranges import checked
from rear_jax.data.sources import forget_splits
from rear_jax.errors import RearError
from rear_jax.jobs import (
    analyze,
    caption,
    convert,
    demo,
    describe,
    evaluate,
    import_codes,
    plan,
    posttrain,
    sample,
    study,
    sweep,
    tokenize,
    tokenizer,
    train,
)
from rear_jax.jobs.job import Job
from rear_jax.runtime import distributed, lock
from rear_jax.sampling.conditions import scored

JOBS: dict[str, Job] = {
    "tokenizer": Job(tokenizer.run, tokenizer.check, shared=True),
    "tokenize": Job(tokenize.run, tokenize.check, shared=True),
    "caption": Job(caption.run, caption.check, shared=True),
    "describe": Job(describe.run, describe.check),
    "import": Job(import_codes.run, import_codes.check),
    "train": Job(train.run, train.check, shared=True),
    "posttrain": Job(posttrain.run, posttrain.check, shared=True),
    "sample": Job(sample.run, sample.check, shared=True),
    "evaluate": Job(evaluate.run, evaluate.check),
    "analyze": Job(analyze.run, analyze.check),
    "sweep": Job(sweep.run, sweep.check),
    "convert": Job(convert.run, convert.check),
    "plan": Job(plan.run, plan.check, locks=False),
}
_OTHERS = dict(JOBS)  # which 'study' runs
JOBS["demo"] = Job(demo.run, demo.check, locks=False)
JOBS["study"] = Job(functools.partial(study.run, jobs=_OTHERS), functools.partial(study.check, jobs=_OTHERS))


def check_all(names: Sequence[str], config: ConfigDict, workdir: Path) -> None:
    """Checks jobs that are to run in turn, each for what can be known before the first of them.

    Raises RearError: there is no job, a name is unknown, a job is not for several processes, a setting is out of its
      range, or a check refuses.
    """
    if not names:
        raise RearError(f"no job to run: name some of {', '.join(JOBS)}.")
    for name in names:
        if name not in JOBS:
            raise RearError(f"unknown job {name!r}: use {', '.join(JOBS)}.")
        if jax.process_count() > 1 and not JOBS[name].shared:
            shared = ",".join(other for other, job in JOBS.items() if job.shared)
            raise RearError(f"--job={name} runs in one process: run it on one host, after --job={shared}.")
    config = _of(names, config)
    distributed.agree("jobs, config or workdir", f"{names} {config.to_json_best_effort()} {workdir}")
    forget_splits()
    for place, name in enumerate(names):
        JOBS[name].check(config, workdir, tuple(names[:place]))


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
            check_all(names, config, workdir)
            for name in names:
                JOBS[name].run(config, workdir)
                distributed.wait(name)
    except JaxRuntimeError as error:
        if jax.process_count() == 1 or str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise distributed.lost(error) from error
