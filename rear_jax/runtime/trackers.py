"""Services that keep the numbers and pictures of experiments: Weights & Biases and MLflow. Each is an extra.

One run of a service is one workdir. It is found again by the path of the workdir, so a resumed job goes on in it.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rear_jax.errors import RearError
from rear_jax.runtime import distributed, places
from rear_jax.runtime.extras import needed

PROJECT = "rear_jax"


class Tracker(Protocol):
    """What a service is asked; tags are such as 'train/objective/loss'."""

    def numbers(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Numbers by tag; those of a group have a count of steps of their own."""

    def picture(self, group: str, step: int, tag: str, image: np.ndarray) -> None:
        """One uint8 picture [H, W, 3]."""

    def close(self) -> None:
        """Sends what is left."""


class Wandb:
    """Weights & Biases; without an account, WANDB_MODE=offline keeps everything in `workdir/wandb`."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        """Raises RearError: the package is not installed."""
        with needed("wandb"):
            import wandb
        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=_name_of(workdir),
            name=workdir.name,
            dir=places.scratch(workdir) if places.is_bucket(workdir) else workdir,
            config=dict(config),
            resume="allow",
        )
        self._groups: set[str] = set()

    def numbers(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._log(group, step, values)

    def picture(self, group: str, step: int, tag: str, image: np.ndarray) -> None:
        """See `Tracker`."""
        self._log(group, step, {tag: self._image(image)})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()

    def _log(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """Steps are an axis of their own: those that the service counts never go back, a resumed run does."""
        if group not in self._groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        self._run.log({f"{group}/step": step, **values})


class Mlflow:
    """MLflow; without MLFLOW_TRACKING_URI, everything is in `workdir/mlruns`."""

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        """Raises RearError: the package is not installed."""
        with needed("mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        self._metric, self._sent = Metric, None
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (workdir / "mlruns").as_uri()
        if uri.startswith("gs:"):
            raise RearError(f"MLflow keeps no runs at {uri}: set MLFLOW_TRACKING_URI, or leave 'mlflow' out.")
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        name = _name_of(workdir)
        found = self._client.search_runs([place], f"tags.workdir = '{name}'", max_results=1)
        run = found[0] if found else self._client.create_run(place, run_name=workdir.name, tags={"workdir": name})
        self._run = run.info.run_id
        self._client.log_dict(self._run, dict(config), "config.json")

    def numbers(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        metrics = [self._metric(tag, float(value), now, step) for tag, value in values.items()]
        self._sent = self._client.log_batch(self._run, metrics, synchronous=False)  # one after the other

    def picture(self, group: str, step: int, tag: str, image: np.ndarray) -> None:
        """See `Tracker`."""
        self._client.log_image(self._run, Image.fromarray(image), f"{tag}_{step:09d}.png")

    def close(self) -> None:
        """See `Tracker`."""
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}
_active: list[tuple[Path, Tracker]] = []  # those of the command that runs, each with the folder of its run


@contextlib.contextmanager
def tracking(names: Sequence[str], workdir: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """While a command runs, its writers send to these services what they write; of several processes the first does.

    Raises RearError: the package of a service is not installed.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_active.clear)
        for name in names if distributed.is_first() else ():
            tracker = TRACKERS[name](workdir, config)
            stack.callback(tracker.close)
            _active.append((workdir, tracker))
        yield


def active(folder: Path) -> list[tuple[str, Tracker]]:
    """The services of this command, each with the beginning of tags of what is written in `folder`."""
    return [
        ("".join(f"{part}/" for part in folder.relative_to(root).parts), tracker)
        for root, tracker in _active
        if folder.is_relative_to(root)
    ]


def _name_of(workdir: Path) -> str:
    """Sixteen hexadecimal digits that stand for a workdir."""
    return hashlib.sha256(os.fsencode(workdir.resolve())).hexdigest()[:16]
