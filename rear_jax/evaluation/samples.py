"""Sampled sets as `--job=sample` leaves them, and whether their FID compares with published ones."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_jax.data.archive import ImageArchive
from rear_jax.errors import RearError
from rear_jax.evaluation.reference import ReferencePlan
from rear_jax.metrics.features import INCEPTION_FILE, Network
from rear_jax.metrics.inception import POOLED, SPATIAL
from rear_jax.runtime.atomic import read_json

log = logging.getLogger(__name__)

ADM_REFERENCE = (10_000, 256, 256, 3)  # images of VIRTUAL_imagenet256_labeled.npz
ADM_WIDTHS = (POOLED, SPATIAL)  # ... and of the statistics of all ImageNet's training images beside them


class Samples(NamedTuple):
    """A sampled set.

    Attributes:
      images: read in a stream.
      labels: [n] integers from 0 on, None where nothing says what the images were drawn for.
      recipe: that they were drawn by, or why it is not known.
    """

    images: ImageArchive
    labels: np.ndarray | None
    recipe: dict | str


LABELS = ("labels", "arr_1")  # as --job=sample and as ADM's sampler call them


def open_samples(workdir: Path) -> Samples:
    """What `--job=sample` has left, or an .npz of another program in its place.

    Raises RearError: it is missing or damaged, holds fewer images than were asked for, or labels that are none.
    """
    path, drawn_by = workdir / "samples.npz", workdir / "samples.json"
    images = ImageArchive(path, remedy="delete it and run --job=sample again" if path.exists() else "run --job=sample")
    if not len(images):
        raise RearError(f"{path} cannot be read (no images arr_0): delete it and run --job=sample again.")
    labels, recipe = _labels(images), _recipe(drawn_by)
    asked = recipe["num_images"] if isinstance(recipe, dict) else len(images)
    if len(images) != asked:
        raise RearError(
            f"{path} holds {len(images)} images where {asked} were asked for: delete it and run --job=sample again."
        )
    return Samples(images, labels, recipe)


def _labels(images: ImageArchive) -> np.ndarray | None:
    """The labels [n] in a file, None where it has none; raises RearError where they are not one class an image."""
    name = next((name for name in LABELS if name in images.names), None)
    if name is None:
        log.warning("%s has no array %s: what needs labels is left out", images.path, " or ".join(LABELS))
        return None
    labels = images.read(name)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < 2**31:
        raise RearError(
            f"{images.path}: {name} is {labels.dtype} {labels.shape} for {len(images)} images{_range(labels)}: it "
            "needs one integer from 0 on for each; correct it, or take it out of the file."
        )
    return labels.astype(np.int64)


def _range(labels: np.ndarray) -> str:
    return f", from {labels.min()} to {labels.max()}" if labels.size and labels.dtype.kind in "iuf" else ""


def _recipe(file: Path) -> dict | str:
    """What `samples.json` says, or why it says nothing."""
    if not file.exists():
        return "unknown: no samples.json beside them"
    recipe = read_json(file)
    if type(recipe.get("num_images")) is int:
        return recipe
    log.warning("%s is not of --job=sample: how the samples were drawn is unknown", file)
    return "unknown: samples.json is not of --job=sample"


def not_comparable(network: Network, plan: ReferencePlan, samples: Samples | None, num_classes: int) -> list[str]:
    """Why the FID of these samples is no number to hold against published ones; empty where it is one."""
    if samples is None:
        return ["there are no samples"]
    (count, height, width, _), inception = samples.images.shape, network.extractor.fid
    numbers, per_class = np.unique([] if samples.labels is None else samples.labels, return_counts=True)
    classes, many = max(num_classes, int(numbers.max(initial=-1)) + 1), per_class.max(initial=0)
    few = per_class.min() if len(numbers) == classes else 0
    by_class = isinstance(samples.recipe, dict) and "captions" not in samples.recipe
    adm = plan.statistics is not None and plan.images.shape == ADM_REFERENCE
    digits = INCEPTION_FILE.removesuffix(".pth").rpartition("-")[2]
    conditions = {
        f"the network is {network.extractor.name}, not Inception": inception,
        f"its weights are not those of {INCEPTION_FILE}": not inception or network.file.startswith(digits),
        "the reference is no ADM reference batch of 256 pixels": (
            adm and tuple(len(moments.mean) for moments in plan.statistics) == ADM_WIDTHS
        ),
        f"there are {count} samples, {few} to {many} of each of {classes} classes, not 50 of each of 1000": (
            few == many == 50 and classes == 1000
        ),
        f"the samples have {height}x{width} pixels, not 256x256": (height, width) == (256, 256),
        "nothing says that the samples were drawn by class": by_class,
    }
    return [reason for reason, met in conditions.items() if not met]
