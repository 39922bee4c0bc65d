"""Where jobs leave what the next one reads, and how a folder of checkpoints is opened."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime import identity
from rear_jax.runtime.checkpoints import Checkpoints, abstract
from rear_jax.runtime.mesh import make_mesh, replicated


def tokenizer_folder(workdir: Path) -> Path:
    """Checkpoints of `--job=tokenizer`."""
    return workdir / "tokenizer"


def generator_folder(workdir: Path) -> Path:
    """Checkpoints of `--job=train`."""
    return workdir / "generator"


def best_generator_folder(workdir: Path) -> Path:
    """The checkpoint of `--job=train` that scored best, where `config.train.evaluate_every` asks for scores."""
    return workdir / "generator_best"


def posttrained_folder(workdir: Path) -> Path:
    """Checkpoints of a generator from `--job=posttrain`."""
    return workdir / "posttrained"


def posttrained_decoder_folder(workdir: Path) -> Path:
    """Checkpoints of a tokenizer's decoder from `--job=posttrain`, where the method trains that."""
    return workdir / "posttrained_decoder"


def codes_folder(config: ConfigDict, workdir: Path) -> Path:
    """Code files of `--job=tokenize`."""
    return Path(config.codes_from) if config.codes_from else workdir / "codes"


def open_checkpoints(place: Path, job: str) -> Checkpoints:
    """The checkpoints in a folder, to be read; raises RearError where it does not exist, and names the job to run."""
    if not place.exists():
        raise RearError(f"{place} does not exist: run --job={job} first, or mend the path.")
    return Checkpoints(place, keep=1)


def resumable(folder: Path, loop: ConfigDict, config: ConfigDict, job: str) -> tuple[Checkpoints, dict]:
    """The checkpoints that a training job writes, and the record beside the newest one, {} where there is none.

    `loop` are the settings of the job's loop.

    Raises RearError: the newest checkpoint was made by other settings that the job depends on, or cannot be read.
    """
    checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints, keep_every=loop.keep_every)
    if checkpoints.latest_step() is None:
        return checkpoints, {}
    saved = checkpoints.record()
    identity.refuse_changes(saved, config, identity.TRAINING[job], str(folder))
    return checkpoints, saved


def on_all_devices(shapes: Any, config: ConfigDict) -> Any:
    """Parameters to be restored whole on every device."""
    return abstract(shapes, replicated(make_mesh(config.mesh)))
