"""Where jobs leave what the next one reads, and how a folder of checkpoints is opened."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime import identity, places
from rear_jax.runtime.checkpoints import Checkpoints, Saved, abstract
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


def converted_folder(workdir: Path) -> Path:
    """The checkpoint of `--job=convert`."""
    return workdir / "converted"


MAKERS = {  # job -> the folders of networks that it leaves
    "tokenizer": (tokenizer_folder,),
    "train": (generator_folder, best_generator_folder),
    "posttrain": (posttrained_folder, posttrained_decoder_folder),
    "convert": (converted_folder,),
}


def to_be_made(place: Path, config: ConfigDict, workdir: Path, before: Collection[str]) -> bool:
    """Whether one of the jobs that run before will leave its networks in a folder.

    Args:
      place: the folder.
      config: the experiment.
      workdir: of these jobs.
      before: their names.
    """
    made = {job: [folder(workdir.resolve()) for folder in folders] for job, folders in MAKERS.items() if job in before}
    if config.tokenizer_from:  # that job has nothing to train
        made.pop("tokenizer", None)
    if "train" in made and not 0 < config.train.evaluate_every <= config.train.loop.steps:
        made["train"].remove(best_generator_folder(workdir.resolve()))
    return any(place.resolve() in folders for folders in made.values())


def codes_folder(config: ConfigDict, workdir: Path) -> Path:
    """Code files of `--job=tokenize`."""
    return places.place(config.codes_from) if config.codes_from else workdir / "codes"


def open_checkpoints(place: Path, job: str) -> Checkpoints:
    """The checkpoints in a folder, to be read; raises RearError where it does not exist, and names the job to run."""
    return Checkpoints(saved(place, job).folder, keep=1)


def saved(place: Path, job: str) -> Saved:
    """The same without what only reading them whole needs, for checks."""
    if not place.is_dir():
        what = "is no folder of checkpoints" if place.exists() else "does not exist"
        raise RearError(f"{place} {what}: run --job={job} first, or mend the path.")
    return Saved(place)


def resumable(folder: Path, loop: ConfigDict, config: ConfigDict, job: str) -> tuple[Checkpoints, dict]:
    """The checkpoints that a training job writes, and the record beside the newest one, {} where there is none.

    `loop` are the settings of the job's loop.

    Raises RearError: the newest checkpoint was made by other settings that the job depends on, or cannot be read.
    """
    checkpoints = Checkpoints(folder, keep=loop.keep_checkpoints, keep_every=loop.keep_every)
    if checkpoints.latest_step() is None:
        return checkpoints, {}
    return checkpoints, _own_record(checkpoints, config, job)


def check_resumable(folder: Path, config: ConfigDict, job: str, state: Any) -> bool:
    """Whether a training job goes on from a checkpoint in `folder`; `state` are the shapes of its state.

    Raises RearError: the newest checkpoint was made by other settings, or holds another state.
    """
    found = Saved(folder)
    if not folder.exists() or found.latest_step() is None:
        return False
    _own_record(found, config, job)
    found.refuse_other_state(state, config.to_dict())
    return True


def _own_record(found: Saved, config: ConfigDict, job: str) -> dict:
    """The record beside the newest checkpoint; raises RearError where a training job cannot go on from it."""
    record = found.record()
    identity.refuse_changes(record, config, identity.TRAINING[job], str(found.folder))
    return record


def on_all_devices(shapes: Any, config: ConfigDict) -> Any:
    """Parameters to be restored whole on every device."""
    return abstract(shapes, replicated(make_mesh(config.mesh)))
