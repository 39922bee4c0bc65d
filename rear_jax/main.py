"""The door: `python -m rear_jax.main --config=configs/quickstart.py --workdir=DIR [--job=train,sample] [--dry_run]`."""

import errno
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.runtime import determinism, distributed
from rear_jax.runtime.progress import set_up_logging
from rear_jax.runtime.stopping import Interrupted

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)  # errors that the user can mend

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment to run, a file such as configs/rear_l.py. Change a setting by --config.key=value."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for everything that the jobs leave; a second run with the same folder goes on there."
)
_JOB = flags.DEFINE_list(
    "job", None, f"Jobs to run in turn, of {', '.join(jobs.JOBS)}; without the flag, those of config.jobs."
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Check settings, files, labels, mesh and batches of all jobs, say what would run, and run nothing.",
)
_DETERMINISTIC = flags.DEFINE_bool(
    "deterministic",
    False,
    "On GPUs: only operations that give the same result in every run, so that a resumed run repeats an unbroken one "
    "bit for bit. It costs speed. CPUs and TPUs do so in any case.",
)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; by default the cluster is asked.")
_COUNT = flags.DEFINE_integer("num_processes", None, "How many processes take part; with --coordinator_address.")
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; with --coordinator_address.")
flags.mark_flags_as_required(["config", "workdir"])

SWEPT = re.compile(r"--config\.sample\.(guidance_scale|guidance_power)=")  # in what absl says of a wrong value


def main(arguments: list[str]) -> None:
    """Checks all jobs, then runs them. Exits with 1 and one line on an error that the user can mend."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}: settings are given as --config.key=value")
    _silence_unfinished_writing()
    try:
        config, workdir = _CONFIG.value, _local(_WORKDIR.value)
        names = _JOB.value or config.jobs
        if _DETERMINISTIC.value:
            determinism.ask_for()
        distributed.start(_ADDRESS.value, _COUNT.value, _INDEX.value)
        workdir.mkdir(parents=True, exist_ok=True)
        set_up_logging(workdir / "log.txt", quiet=not distributed.is_first())
        determinism.note(asked=_DETERMINISTIC.value)
        if _DRY_RUN.value:
            jobs.check_all(names, config, workdir)
            if distributed.is_first():
                print(f"dry run: {', '.join(names)} would run in {workdir}; every check passed, nothing was run.")
        else:
            jobs.run_all(names, config, workdir)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
    except RearError as error:
        distributed.fail(f"error: {error}")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_DISK:
            where = error.filename or _WORKDIR.value
            distributed.fail(f"error: {error.strerror}: {where}. Mend that and run the command again.")
        if distributed.are_several():  # at its end, python would wait for the others, which wait for this one
            distributed.fail(traceback.format_exc())
        raise


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


def _local(workdir: str) -> Path:
    if "://" in workdir:
        raise RearError(f"--workdir={workdir} is not a folder: mount the bucket (gcsfuse) and give the mount point.")
    return Path(workdir).resolve()


def _parse(arguments: list[str]) -> list[str]:
    """absl's parser, with a missing config file, an unknown key or a value that does not fit in one line."""
    absl.logging.set_verbosity(absl.logging.FATAL)  # what libraries log on the way to an error that we report
    try:
        rest = flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:
        lines = str(error).replace("\\n", "\n").replace("\\'", "").strip("\"'").splitlines()
        hint = next((line.strip("\"' ") for line in lines if line.startswith("Did you mean")), "")
        sys.exit(f"error: config has no key {lines[0][:80]!r}. {hint}".rstrip())
    except flags.Error as error:
        several = SWEPT.search(str(error))
        hint = f"; several are for --job=sweep: --config.sweep.{several[1]}='(1.5, 2.0)'" if several else ""
        sys.exit(f"error: {str(error).splitlines()[0]}{hint}")
    except RearError as error:  # of the config file itself
        sys.exit(f"error: {error}")
    file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not Path(file).is_file():
        sys.exit(f"error: --config={file} does not exist: give a file such as configs/quickstart.py.")
    return rest


if __name__ == "__main__":
    command()
