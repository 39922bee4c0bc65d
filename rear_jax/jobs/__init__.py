"""Jobs: one file each, a `run(config, workdir)` that reads top to bottom."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.jobs import (
    convert,
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
from rear_jax.runtime import distributed

JOBS: dict[str, study.Job] = {
    "tokenizer": tokenizer.run,
    "tokenize": tokenize.run,
    "import": import_codes.run,
    "train": train.run,
    "posttrain": posttrain.run,
    "sample": sample.run,
    "evaluate": evaluate.run,
    "sweep": sweep.run,
    "convert": convert.run,
    "plan": plan.run,
}
JOBS["study"] = functools.partial(study.run, jobs=dict(JOBS))  # which runs the others
SHARED = ("tokenizer", "tokenize", "train", "posttrain", "sample")  # by all processes; the others are for one


def run_all(names: Sequence[str], config: ConfigDict, workdir: Path) -> None:
    """Runs jobs in turn; no process begins with one before all have ended the one before it.

    Raises RearError: a name is unknown, or a job is not for several processes; besides, whatever the jobs raise.
    """
    for name in names:
        if name not in JOBS:
            raise RearError(f"unknown job {name!r}: use {', '.join(JOBS)}.")
        if jax.process_count() > 1 and name not in SHARED:
            raise RearError(f"--job={name} runs in one process: run it on one host, after --job={','.join(SHARED)}.")
    distributed.agree("jobs, config or workdir", f"{names} {config.to_json_best_effort()} {workdir}")
    try:
        for name in names:
            JOBS[name](config, workdir)
            distributed.wait(name)
    except JaxRuntimeError as error:
        if jax.process_count() == 1 or str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise distributed.lost(error) from error
