"""`--job=show`: the settings that an experiment changes, what its workdir holds, and the command to type next."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.config import default, ranges
from rear_jax.jobs.job import Job
from rear_jax.runtime import command_line
from rear_jax.runtime.checkpoints import Saved

TRAINED_BY = {"tokenizer": "tokenizer_training", "train": "train", "posttrain": "posttrain"}  # job -> its section
TAKEN_FROM = {  # job -> the setting that names what stands in for what the job would make
    "tokenizer": "tokenizer_from",
    "tokenize": "codes_from",
    "import": "codes_from",
    "caption": "captions_from",
}


def run(config: ConfigDict, workdir: Path, jobs: Mapping[str, Job]) -> None:
    """Prints it all; changes nothing."""
    changed = [f"  --config.{key}={value!r}  (default {usual!r})" for key, value, usual in _changed(config)]
    print("Settings that differ from the defaults:", *(changed or ["  none"]), "", sep="\n")
    of_state = {_state(name, job, config, workdir): name for name, job in reversed(jobs.items())}  # one of two makers
    found = [f"  {name}: {state}" for state, name in reversed(of_state.items()) if state]
    print(f"In {workdir}:", *(found or ["  nothing yet"]), "", sep="\n")
    open_jobs = [name for name in config.jobs if name in jobs and not _is_done(name, jobs[name], config, workdir)]
    if open_jobs:
        print("Next:", f"  {command_line.typed(','.join(open_jobs))}", sep="\n")
    else:
        print(f"All jobs of the config are done: {', '.join(config.jobs) or 'it names none'}.")


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""


def _changed(config: ConfigDict) -> Iterator[tuple[str, object, object]]:
    """(name, value, default) of each setting; networks are compared with the defaults of their families."""
    usual = default()
    with usual.unlocked():
        for section, families in (("model", generators.FAMILIES), ("tokenizer", tokenizers.FAMILIES)):
            if config[section].name in families:
                usual[section] = families[config[section].name].section()
    known = {key: section[name] for key, (section, name) in ranges.leaves(usual)}
    for key, (section, name) in ranges.leaves(config):
        if section[name] != known.get(key):
            yield key, section[name], known.get(key)


def _state(name: str, job: Job, config: ConfigDict, workdir: Path) -> str:
    """What a job has left, in words; '' where there is nothing."""
    there = job.found(workdir)
    if not there:
        return ""
    step = _step(there[0])
    trained = f"step {step} of {config[TRAINED_BY[name]].loop.steps}, " if name in TRAINED_BY and step else ""
    return trained + ", ".join(str(place.relative_to(workdir)) for place in there)


def _is_done(name: str, job: Job, config: ConfigDict, workdir: Path) -> bool:
    """Whether a job has nothing left to do, as far as the names of files tell."""
    if config.get(TAKEN_FROM.get(name, ""), "") or (name == "tokenize" and config.codes.on_the_fly):
        return True
    there = job.found(workdir)
    if name in TRAINED_BY:
        return bool(there) and _step(there[0]) >= config[TRAINED_BY[name]].loop.steps
    return bool(there) and there[0].name == Path(job.leaves[0]).name


def _step(folder: Path) -> int:
    """The newest step of a folder of checkpoints, 0 where there is none."""
    return (Saved(folder).latest_step() or 0) if folder.is_dir() else 0
