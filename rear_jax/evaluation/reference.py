"""What images are compared with: reference images or their statistics, computed once and kept.

`--job=evaluate` uses these; so can whatever else wants a score of a set of images: make the extractor and the reference
once, then call `metrics.scores.score` as often as there are sets.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.archive import STATISTICS, ImageArchive
from rear_jax.data.batches import ordered_batches
from rear_jax.data.sources import open_split
from rear_jax.data.sources.interface import Spread, spread
from rear_jax.errors import RearError
from rear_jax.metrics import scores
from rear_jax.metrics.features import FeatureExtractor, Network, load_network
from rear_jax.metrics.statistics import Gaussian
from rear_jax.runtime import places
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.progress import ProgressBar

log = logging.getLogger(__name__)


def score_settings(settings: ConfigDict) -> scores.Settings:
    """What of `config.evaluate` the scores depend on; raises RearError where KID's subsets are too small."""
    if settings.kid_subset_size == 1:
        raise RearError("config.evaluate.kid_subset_size = 1: an unbiased KID needs 2 or more; 0 leaves it out.")
    return scores.Settings(settings.neighbours, settings.kid_subsets, settings.kid_subset_size)


class RealImages(Spread):
    """A number of images of a split of `config.data`, evenly spread over it, or all where it has fewer.

    With `of`, they are some of so many that are evenly spread themselves, as `config.train.num_images` chooses them.
    """

    def __init__(self, data: ConfigDict, split: str, wanted: int, *, of: int = 0):
        source = open_split(data, split)
        among = Spread(source, of or len(source))
        super().__init__(among, wanted)
        self.size, self._total, self._contents = data.image_size, len(among), source.contents
        self.name = f"{len(self)} images of {data.source} {data.path}/{split}, evenly spread, centre crop"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, S, S, 3), of all batches together."""
        return len(self), self.size, self.size, 3

    def batches(self, batch_size: int, labels: list[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 batches [b, S, S, 3] in order; their labels [b] are added to `labels`."""
        for batch in ordered_batches(self, image_size=self.size, batch_size=batch_size):
            labels.append(batch["label"])
            yield batch["image"]

    def fingerprint(self) -> str:
        """Names the set by its size and all images that it is taken of."""
        return hashlib.sha256(f"{len(self)} at {self.size} of {self._total} {self._contents}".encode()).hexdigest()[:16]


class ReferencePlan(NamedTuple):
    """A reference that need not be computed yet.

    Attributes:
      images: what it is of.
      name: of that, for people.
      fingerprint: names the file that keeps it.
      size: pixels a side, 0 where only statistics are known.
      statistics: of pooled and spatial features, where `images` brings its own; those of its images otherwise.
    """

    images: RealImages | ImageArchive
    name: str
    fingerprint: str
    size: int
    statistics: tuple[Gaussian, Gaussian] | None


def outline_network(settings: ConfigDict) -> Network:
    """`load_network` for checks: the file is read, but no parameter goes to a device, and nothing can be extracted."""
    made: list[Network] = []
    jax.eval_shape(lambda: made.append(load_network(settings)))  # in here, placing an array is a shape alone
    return made[0]


def plan_reference(config: ConfigDict, network: Network) -> ReferencePlan:
    """What the images are to be compared with: those of `config.evaluate.reference`, or training images.

    Raises RearError: the file or the data set is missing, damaged, or of no use as a reference; or the statistics are
      of other features than the network's.
    """
    settings, statistics = config.evaluate, None
    if settings.reference:
        place = places.place(settings.reference)
        if place.is_dir():
            raise RearError(
                f"config.evaluate.reference = {settings.reference} is a folder: give an .npz of images, or leave it "
                "'' and set config.data.path to the folder of your data."
            )
        images = ImageArchive(place, remedy="give config.evaluate.reference another .npz")
        if network.extractor.fid and set(STATISTICS) <= set(images.names):
            statistics = _read_statistics(images, network.extractor)
        elif not images.shape:
            raise RearError(f"{images.path} is no reference: it has neither images arr_0 nor statistics of Inception.")
        size = images.shape[1] if images.shape else 0
        name = f"{images.path.name}: {len(images)} images"
        return ReferencePlan(images, name, _fingerprint(images.fingerprint, network, settings), size, statistics)
    return plan_of(RealImages(config.data, config.data.train_split, settings.num_reference), network, settings)


def plan_of(images: RealImages, network: Network, settings: ConfigDict) -> ReferencePlan:
    """To compare with these very images; `settings` are `config.evaluate`."""
    return ReferencePlan(images, images.name, _fingerprint(images.fingerprint(), network, settings), images.size, None)


def _fingerprint(content: str, network: Network, settings: ConfigDict) -> str:
    decides = (content, network.weights, network.extractor.recipe, settings.num_compared)
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]


def require_scores(
    plan: ReferencePlan, extractor: FeatureExtractor, settings: ConfigDict, shape: tuple[int, ...]
) -> None:
    """Raises RearError where images of `shape` [n, H, W, 3] do not compare with the reference, or are too few."""
    scores.require_size(plan.name, plan.size, *shape[1:3])
    scores.require_images(extractor, score_settings(settings), shape[0], min(len(plan.images), settings.num_compared))


def prepare_reference(
    plan: ReferencePlan, extractor: FeatureExtractor, settings: ConfigDict, folder: Path
) -> scores.Reference:
    """The reference of a plan, read from `folder` where it was made before, else computed and kept there.

    Raises RearError: an image or statistic cannot be read, or is not fit for the network.
    """
    path = folder / f"reference-{plan.fingerprint}.npz"
    if path.exists():
        try:
            return scores.Reference.load(path)
        except (ValueError, TypeError) as error:  # a value of another kind; what is damaged is named by the reader
            raise RearError(f"{path} cannot be read ({error}): delete it and run --job=evaluate again.") from error
    reference = _compute_reference(plan, extractor, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        reference.save(temporary)
    log.info("evaluate: kept the reference in %s", path)
    return reference


def _compute_reference(plan: ReferencePlan, extractor: FeatureExtractor, settings: ConfigDict) -> scores.Reference:
    labels: list[np.ndarray] = []
    described = None
    if isinstance(plan.images, RealImages):
        described = describe(plan.images.batches(settings.batch_size, labels), len(plan.images), extractor, "reference")
    elif plan.images.shape:
        described = describe(plan.images.batches(settings.batch_size), len(plan.images), extractor, "reference")
    moments, spatial = plan.statistics or (scores.moments(described.pooled), described.spatial)
    pooled = described.pooled if described else np.zeros((0, extractor.dim), np.float32)
    compared = spread(len(pooled), settings.num_compared) if len(pooled) else slice(0)
    return scores.Reference(
        name=plan.name,
        fingerprint=plan.fingerprint,
        size=plan.size,
        moments=moments,
        spatial=spatial,
        features=pooled[compared],
        labels=np.concatenate(labels)[compared] if labels else np.zeros(0, np.int32),
    )


def describe(batches: Iterable[np.ndarray], count: int, extractor: FeatureExtractor, name: str) -> scores.Described:
    """`metrics.scores.describe` under a progress bar."""
    with ProgressBar(f"evaluate {name}", total=count, unit="image") as bar:
        return scores.describe(extractor, bar.over(batches))


def _read_statistics(archive: ImageArchive, extractor: FeatureExtractor) -> tuple[Gaussian, Gaussian]:
    """Of the pooled and of the spatial features."""
    found = []
    for mean, covariance, width in zip(
        STATISTICS[::2], STATISTICS[1::2], (extractor.dim, extractor.spatial_dim), strict=True
    ):
        moments = Gaussian(*(archive.read(name).astype(np.float64) for name in (mean, covariance)))
        if (moments.mean.shape, moments.covariance.shape) != ((width,), (width, width)):
            raise RearError(
                f"{archive.path}: {mean} {moments.mean.shape} and {covariance} {moments.covariance.shape} are no "
                f"moments of the network's {width} features: give config.evaluate.reference another file."
            )
        found.append(moments)
    return tuple(found)


def recipe_of(settings: ConfigDict, network: Network, plan: ReferencePlan) -> dict[str, object]:
    """The part of a score's recipe that the network, the reference and `config.evaluate` decide."""
    return {
        **scores.recipe_of(network.extractor, score_settings(settings)),
        "weights": network.weights,
        **({"weights_file_sha256": network.file} if network.file else {}),
        "reference": plan.name,
        "reference_size": plan.size,
        "reference_fingerprint": plan.fingerprint,
        "compared_one_by_one": f"at most {settings.num_compared} images of the reference, evenly spread",
    }
