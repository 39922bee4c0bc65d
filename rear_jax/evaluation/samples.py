"""Sampled sets as `--job=sample` leaves them, and whether their FID compares with published ones."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_jax.data.archive import ImageArchive
from rear_jax.errors import RearError
from rear_jax.evaluation.reference import ReferencePlan
from rear_jax.metrics.features import INCEPTION_FILE, Network
from rear_jax.metrics.inception import POOLED, SPATIAL

ADM_REFERENCE = (10_000, 256, 256, 3)  # images of VIRTUAL_imagenet256_labeled.npz
ADM_WIDTHS = (POOLED, SPATIAL)  # ... and of the statistics of all ImageNet's training images beside them


class Samples(NamedTuple):
    """A sampled set: its images, read in a stream, their labels [n], and the recipe that it was drawn by."""

    images: ImageArchive
    labels: np.ndarray
    recipe: dict | str


def open_samples(workdir: Path) -> Samples:
    """What `--job=sample` has left.

    Raises RearError: it is missing or damaged, or holds fewer images than were asked for.
    """
    path, drawn_by = workdir / "samples.npz", workdir / "samples.json"
    images = ImageArchive(path, remedy="delete it and run --job=sample again" if path.exists() else "run --job=sample")
    if not images.shape:
        raise RearError(f"{path} cannot be read (no images arr_0): delete it and run --job=sample again.")
    labels = images.read("labels")
    recipe = json.loads(drawn_by.read_text()) if drawn_by.exists() else "unknown: no samples.json beside them"
    asked = recipe["num_images"] if isinstance(recipe, dict) else len(images)
    if not len(images) == len(labels) == asked:
        raise RearError(
            f"{path} holds {len(images)} images and {len(labels)} labels where {asked} were asked for: "
            "delete it and run --job=sample again."
        )
    return Samples(images, labels, recipe)


def not_comparable(network: Network, plan: ReferencePlan, samples: Samples | None, num_classes: int) -> list[str]:
    """Why the FID of these samples is no number to hold against published ones; empty where it is one."""
    if samples is None:
        return ["there are no samples"]
    (count, height, width, _), inception = samples.images.shape, network.extractor.fid
    per_class = np.bincount(samples.labels, minlength=num_classes)
    few, many, classes = per_class.min(), per_class.max(), len(per_class)
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
