"""The door: `rear-jax --config=quickstart --workdir=DIR [--job=train,sample] [--dry_run]`."""

import errno
import itertools
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from rear_jax import help, jobs
from rear_jax.config import files
from rear_jax.config.ranges import PATH, checked
from rear_jax.errors import RearError, printable
from rear_jax.runtime import determinism, distributed, places
from rear_jax.runtime.progress import set_up_logging
from rear_jax.runtime.stopping import Interrupted, ended_by

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)  # errors that the user can mend

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment to run: a name of `rear-jax configs`, or a file; with NAME:OPTION, in a variant."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for everything that the jobs leave; a second run with the same folder goes on there."
)
_JOB = flags.DEFINE_list(
    "job", None, "Jobs to run in turn, with commas between; without the flag, those that the config names."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Check settings, files, labels, mesh and batches of all jobs, and run nothing.",
)
_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On GPUs: a resumed run repeats an unbroken one bit for bit. It costs speed. CPUs and TPUs do so in any case.",
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; by default the cluster is asked.")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes take part; with --coordinator_address.")
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; with --coordinator_address.")
flags.mark_flags_as_required(["config", "workdir"])

CONFIG_FLAGS = ("--config", "-config")
SWEPT = re.compile(r"--config\.sample\.(guidance_scale|guidance_power)=")  # in what absl says of a wrong value
RAISED = re.compile(r"[A-Za-z_.]+(Error|Exception): ")  # the line of a traceback that names the exception


def main(arguments: list[str]) -> None:
    """Checks all jobs, then runs them. Exits with 1 and one line on an error that the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}: settings are given as --config.key=value")
    _silence_unfinished_writing()
    try:
        config, workdir = _config(), _local(_WORKDIR.value)
        names = config.jobs if _JOB.value is None else _JOB.value
        if _DETERMINISTIC.value:
            determinism.ask_for()
        distributed.start(_ADDRESS.value, _COUNT.value, _INDEX.value)
        _open(workdir)
        determinism.note(asked=_DETERMINISTIC.value)
        if _DRY_RUN.value:
            jobs.check_all(names, config, workdir)
            if distributed.is_first():
                print(f"dry run: {', '.join(names)} would run in {workdir}; every check passed, nothing was run.")
        else:
            jobs.run_all(names, config, workdir)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
    except KeyboardInterrupt:  # where no job listens for the signal: while it compiles, say
        distributed.fail(ended_by("SIGINT"))
    except RearError as error:
        distributed.fail(printable(f"error: {error}"))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            where = error.filename or _WORKDIR.value
            distributed.fail(printable(f"error: {error.strerror}: {where}. Mend that and run the command again."))
        if places.is_answer(error):
            distributed.fail(f"error: {places.told(error)}. Mend that and run the command again.")
        if distributed.are_several():  # at its end, python would wait for the others, which wait for this one
            distributed.fail(traceback.format_exc())
        raise
    finally:
        places.upload_last()


def command() -> None:
    """Entry point: flag and config errors are one line too."""
    app.run(main, flags_parser=_parse)


def _silence_unfinished_writing() -> None:
    """Nothing is printed behind an error's line by the tasks of a checkpoint whose writing has failed."""
    sys.unraisablehook = _unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _unraisable(unraisable: Any) -> None:
    """Python's own hook, but for what the files of a checkpoint have to say after its writing has failed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _config() -> ConfigDict:
    """The settings; raises RearError where one is out of its range, or the config file returns something else."""
    if not isinstance(_CONFIG.value, ConfigDict):
        kind = type(_CONFIG.value).__name__
        raise RearError(f"--config: get_config() returns a {kind}: it must return rear_jax.config.default(), changed.")
    return checked(_CONFIG.value)


def _local(workdir: str) -> Path:
    if "://" in workdir:
        return places.place(workdir)
    if not workdir or not PATH.fits(workdir):
        raise RearError(f"--workdir={workdir} is none: give {PATH.words}.")
    try:
        return Path(workdir).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise RearError(f"--workdir={workdir} cannot be followed ({error}): name another folder.") from error


def _open(workdir: Path) -> None:
    """Makes the workdir and begins its log; raises RearError where it cannot be a folder."""
    places.require(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        set_up_logging(workdir / "log.txt", quiet=not distributed.is_first())
    except OSError as error:
        if error.errno in OF_THE_DISK:
            raise
        raise RearError(
            f"--workdir={workdir}: no folder can be there ({error.strerror}: {error.filename}): name another one."
        ) from error


def _parse(arguments: list[str]) -> list[str]:
    """absl's parser; what is wrong with a flag, the config file or a value is one line."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # what libraries log on the way to an error that we report
    said = help.answer(arguments[1:], _own_flags())
    if said is not None:
        print(said)
        sys.exit(0)
    try:
        arguments = [_found(word, before) for before, word in itertools.pairwise(["", *arguments])]
        rest = flags.FLAGS(arguments)
    except flags.Error as error:
        several = SWEPT.search(str(error))
        hint = f"; several are for --job=sweep: --config.sweep.{several[1]}='(1.5, 2.0)'" if several else ""
        sys.exit(printable(f"error: {_told(error)}{hint}"))
    except RearError as error:  # of the config file itself
        sys.exit(printable(f"error: {error}"))
    except Exception as error:
        sys.exit(printable(f"error: {_of_config_file(error, _config_file(arguments))}"))
    return rest


def _own_flags() -> list[flags.Flag]:
    """Those of this file, in its order."""
    holders = (_CONFIG, _WORKDIR, _JOB, _DRY_RUN, _DETERMINISTIC, _ADDRESS, _COUNT, _INDEX)
    return [flags.FLAGS[holder.name] for holder in holders]


def _found(word: str, before: str) -> str:
    """A word of the command line; if it names the config, with the path of that file in the place of its name."""
    flag, _, value = ("", "", word) if before in CONFIG_FLAGS else word.partition("=")
    if not (before in CONFIG_FLAGS or flag in CONFIG_FLAGS) or not value:
        return word
    name, colon, option = value.partition(":")
    return f"{flag}{'=' if flag else ''}{files.find(name)}{colon}{option}"


def _told(error: flags.Error) -> str:
    """absl's line on a wrong flag; of a config file with a wrong value, where it gives the traceback, its error too."""
    first, *others = str(error).strip().splitlines()
    raised = [line for line in others if RAISED.match(line)]
    return f"{first} {raised[-1]}" if raised else first


def _of_config_file(error: Exception, file: str) -> str:
    """What to say of an exception that left the config file, or the settings after it on the command line."""
    text = str(error).replace("\\n", "\n").replace("\\'", "").strip("\"'")
    first, *others = text.splitlines() or [""]
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == os.path.abspath(file)]
    if isinstance(error, AttributeError) and first.endswith("has no attribute 'get_config"):
        return f"--config={file} has no function get_config(), which returns the settings: see configs/quickstart.py."
    if isinstance(error, AttributeError | KeyError) and (not frames or "does not exist" in first):
        hint = next((line.strip("\"' ") for line in others if line.startswith("Did you mean")), "")
        return f"config has no key {first[:80]!r}. {hint}".rstrip()
    line = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
    return f"--config={file} fails{f' in line {line}' if line else ''} ({type(error).__name__}: {first}): mend it."


def _config_file(arguments: list[str]) -> str:
    """The file of the flag --config, which absl does not tell where reading it failed."""
    given = ""
    for one, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, equals, value = one.partition("=")
        if flag in CONFIG_FLAGS:
            given = value if equals else following
    return given.partition(":")[0]


if __name__ == "__main__":
    command()
