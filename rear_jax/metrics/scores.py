"""The scores of a set of generated images against a reference, from the features of one network.

`describe` looks at the images of a set once, in a stream; `Reference` is what is kept of the real images, to be made
once and stored; `score` compares. With Inception the scores are those of ADM's evaluator (guided-diffusion,
evaluations/evaluator.py), and KID; with another network a Fréchet distance under that network's name, precision and
recall.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.metrics.features import FeatureExtractor, stream
from rear_jax.metrics.inception_score import SPLITS, inception_score
from rear_jax.metrics.kernel_distance import kernel_distance
from rear_jax.metrics.precision_recall import precision_recall
from rear_jax.metrics.statistics import Gaussian, GaussianStatistics, frechet_distance
from rear_jax.runtime.array_files import open_npz

ROWS = 4096  # spatial features whose moments are taken at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the scores depend on beside the images: keys of `config.evaluate`.

    Attributes:
      neighbours: k of precision and recall.
      kid_subsets: pairs of subsets that KID is averaged over.
      kid_subset_size: images in each; 0 leaves KID out.
    """

    neighbours: int
    kid_subsets: int
    kid_subset_size: int


@dataclasses.dataclass(frozen=True)
class Described:
    """What one set of images looks like to a network.

    Attributes:
      pooled: [n, D] float32.
      spatial: moments of the spatial features, where the network has them.
      logits: [n, 1008] float32, likewise.
    """

    pooled: np.ndarray
    spatial: Gaussian | None
    logits: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Reference:
    """The real images of a comparison.

    Attributes:
      name: what they are, for people.
      fingerprint: names the images, the network and everything between them.
      size: pixels a side, 0 where only statistics are known.
      moments: of the pooled features, of all images there are.
      spatial: ... and of the spatial ones, or None.
      features: [m, D] float32, pooled, of the images that precision, recall and KID look at; m may be 0.
      labels: [m] of the same, or [0] where they are not known.
    """

    name: str
    fingerprint: str
    size: int
    moments: Gaussian
    spatial: Gaussian | None
    features: np.ndarray
    labels: np.ndarray

    def save(self, path: Path) -> None:
        """Writes an .npz that `load` reads."""
        spatial = {} if self.spatial is None else {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        with path.open("wb") as file:
            np.savez(
                file,
                name=self.name,
                fingerprint=self.fingerprint,
                size=self.size,
                mu=self.moments.mean,
                sigma=self.moments.covariance,
                **spatial,
                features=self.features,
                labels=self.labels,
            )

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Reads what `save` has written."""
        with open_npz(path, "delete it and run --job=evaluate again") as file:
            return cls(
                name=str(file.read("name")),
                fingerprint=str(file.read("fingerprint")),
                size=int(file.read("size")),
                moments=Gaussian(file.read("mu"), file.read("sigma")),
                spatial=Gaussian(file.read("mu_s"), file.read("sigma_s")) if "mu_s" in file.members else None,
                features=file.read("features"),
                labels=file.read("labels"),
            )


def describe(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> Described:
    """Takes the features of a set in one pass over uint8 images [b, H, W, 3] of one size, no b larger than the first.

    Raises RearError: there are no images, or a feature is not finite.
    """
    pooled, logits, waiting, spatial = [], [], [], None
    for features in stream(extractor, batches):
        pooled.append(features["pooled"])
        if "logits" in features:
            logits.append(features["logits"])
        if "spatial" in features:
            spatial = spatial or GaussianStatistics.empty(features["spatial"].shape[1])
            waiting.append(features["spatial"])
            if sum(map(len, waiting)) >= ROWS:
                spatial, waiting = spatial.update(np.concatenate(waiting)), []
    if waiting:
        spatial = spatial.update(np.concatenate(waiting))
    result = Described(
        pooled=np.concatenate(pooled),
        spatial=spatial.finish() if spatial else None,
        logits=np.concatenate(logits) if logits else None,
    )
    if not np.isfinite(result.pooled).all():
        raise RearError(
            f"{extractor.name} gives features that are NaN or infinite; look at the images and its weights."
        )
    return result


def moments(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features [n, D] in float64, a few thousand rows at a time."""
    statistics = GaussianStatistics.empty(features.shape[1])
    for start in range(0, len(features), ROWS):
        statistics = statistics.update(features[start : start + ROWS])
    return statistics.finish()


def score(
    reference: Reference, batches: Iterable[np.ndarray], extractor: FeatureExtractor, settings: Settings
) -> dict[str, float]:
    """The scores of a stream of generated images: `describe` and `compare` in one.

    The reference must have been made with the same extractor; the batches are as in `describe`.

    Raises RearError: as `describe` and `compare`; or the images are of another size than the reference's.
    """
    return compare(reference, describe(extractor, same_size(reference, batches)), extractor, settings)


def same_size(reference: Reference, batches: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Passes batches on that have the reference's size.

    Raises RearError: one has another.
    """
    for batch in batches:
        require_size(reference.name, reference.size, *batch.shape[1:3])
        yield batch


def require_size(name: str, size: int, height: int, width: int) -> None:
    """Raises RearError where images do not have the `size` of the reference called `name`; 0 fits any."""
    if size and (height, width) != (size, size):
        raise RearError(
            f"Images of {height}x{width} pixels do not compare with {name} of {size}: use a reference of their size."
        )


def require_images(extractor: FeatureExtractor, settings: Settings, generated: int, compared: int) -> None:
    """Asks, before any image has been looked at, whether there are enough for every score that `compare` gives.

    The set has `generated` images. Precision, recall and KID look at `compared` images of the reference, which are 0
    where it has statistics alone.

    Raises RearError: there are too few for a score.
    """
    fewest = min(generated, compared)
    cases = {distance_name(extractor): (generated, 2, "")}
    if extractor.fid:
        cases["IS"] = (generated, SPLITS, "")
    if compared:
        cases["precision"] = (fewest, settings.neighbours + 1, " or lower config.evaluate.neighbours")
    if extractor.fid and compared and settings.kid_subset_size:
        cases["KID"] = (fewest, settings.kid_subset_size, " or lower config.evaluate.kid_subset_size (0 = no KID)")
    for score, (there, needed, instead) in cases.items():
        if there < needed:
            raise RearError(
                f"{score} needs {needed} images or more; there are {generated}, to compare with {compared} of the "
                f"reference: take more{instead}."
            )


def compare(
    reference: Reference, generated: Described, extractor: FeatureExtractor, settings: Settings
) -> dict[str, float]:
    """Scores by name: FID, sFID, IS, precision, recall and KID, or a network's own FD, precision and recall.

    What the reference does not hold (spatial statistics, features of single images) is left out.

    Raises RearError: the widths do not fit, there are too few images for a score, or a feature is not finite.
    """
    scores = {distance_name(extractor): frechet_distance(moments(generated.pooled), reference.moments)}
    if generated.spatial and reference.spatial:
        scores["sFID"] = frechet_distance(generated.spatial, reference.spatial)
    if generated.logits is not None:
        scores["IS"] = inception_score(generated.logits)
    if len(reference.features):
        found = precision_recall(reference.features, generated.pooled, settings.neighbours)
        scores |= {"precision": found.precision, "recall": found.recall}
    if generated.logits is not None and len(reference.features) and settings.kid_subset_size:
        scores["KID"] = kernel_distance(
            generated.pooled,
            reference.features,
            subsets=settings.kid_subsets,
            subset_size=settings.kid_subset_size,
        )
    return scores


def distance_name(extractor: FeatureExtractor) -> str:
    """'FID' on the features of the published one; any other network's Fréchet distance bears the network's name."""
    return "FID" if extractor.fid else f"FD-{extractor.name}"


def recipe_of(extractor: FeatureExtractor, settings: Settings) -> dict[str, object]:
    """The part of a score's recipe that this module decides."""
    recipe: dict[str, object] = {"features": extractor.recipe, "precision_recall_neighbours": settings.neighbours}
    if extractor.fid:
        recipe["inception_score"] = f"{SPLITS} consecutive splits, logits without bias"
        if settings.kid_subset_size:
            subsets = f"{settings.kid_subsets} subsets of {settings.kid_subset_size}"
            recipe["kid"] = f"{subsets}, kernel (x·y/D + 1)³, unbiased"
    return recipe
