"""What an evaluation is made of: the network, the reference images, and the tokenizer's reconstructions.

`--job=evaluate` puts these together; so can whatever else wants a score of a set of images: make the extractor and the
reference once, then call `metrics.scores.score` as often as there are sets.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, eight_bit
from rear_jax.atomic import atomic_file
from rear_jax.convert import efficientnet as efficientnet_weights
from rear_jax.convert import inception as inception_weights
from rear_jax.data.archive import STATISTICS, ImageArchive
from rear_jax.data.batches import ordered_batches
from rear_jax.data.images import open_source
from rear_jax.errors import RearError
from rear_jax.metrics import scores
from rear_jax.metrics.efficientnet import SCALES
from rear_jax.metrics.features import FeatureExtractor, efficientnet_extractor, inception_extractor
from rear_jax.metrics.inception import POOLED, SPATIAL
from rear_jax.metrics.similarity import psnr, ssim
from rear_jax.metrics.statistics import Gaussian
from rear_jax.progress import ProgressBar
from rear_jax.tokenizers import quantizer
from rear_jax.training import mesh as placement
from rear_jax.training.perceptual import PerceptualNetwork

log = logging.getLogger(__name__)

PROBES = 8  # images of a data set that its fingerprint is taken of
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the digits are those that its SHA-256 begins with
ADM_REFERENCE = (10_000, 256, 256, 3)  # images of VIRTUAL_imagenet256_labeled.npz
ADM_WIDTHS = (POOLED, SPATIAL)  # ... and of the statistics of all ImageNet's training images beside them


class Network(NamedTuple):
    """An extractor, the hash of its parameters, and the SHA-256 of the file they are from, '' of one from a package."""

    extractor: FeatureExtractor
    weights: str
    file: str = ""


def load_network(settings: ConfigDict) -> Network:
    """The network of `config.evaluate` with its weights.

    Raises:
      RearError: its name is unknown, or its weights are not given, missing, damaged or of another network.
    """
    if settings.network in SCALES:
        params = efficientnet_weights.load(settings.network)
        extractor = efficientnet_extractor(params, settings.network, settings.feature_size)
    elif settings.network == "inception":
        if not settings.inception:
            raise RearError(
                "config.evaluate.network = 'inception' needs its weights: give config.evaluate.inception, "
                f"the file {INCEPTION_FILE}."
            )
        params = inception_weights.load(settings.inception)
        with Path(settings.inception).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Network(inception_extractor(params), artifacts.fingerprint(params, {}), digest)
    else:
        raise RearError(f"config.evaluate.network = {settings.network!r}: use {', '.join(SCALES)} or inception.")
    return Network(extractor, artifacts.fingerprint(params, {}))


def score_settings(settings: ConfigDict) -> scores.Settings:
    """What of `config.evaluate` the scores depend on; raises RearError where KID's subsets are too small."""
    if settings.kid_subset_size == 1:
        raise RearError("config.evaluate.kid_subset_size = 1: an unbiased KID needs 2 or more; 0 leaves it out.")
    return scores.Settings(settings.neighbours, settings.kid_subsets, settings.kid_subset_size)


class RealImages:
    """A number of images of a source, evenly spread over it, so that a set sorted by class stays balanced."""

    def __init__(self, data: ConfigDict, split: str, wanted: int):
        """Opens `split` of `config.data`; takes `wanted` of its images, or all where it has fewer."""
        self.source = open_source(data.source, data.path, split)
        self.indices = spread(len(self.source), wanted)
        self.size = data.image_size
        self.name = f"{len(self.indices)} images of {data.source} {data.path}/{split}, evenly spread, centre crop"

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, S, S, 3), of all batches together."""
        return len(self), self.size, self.size, 3

    def __getitem__(self, index) -> tuple[np.ndarray, int]:
        return self.source[int(self.indices[int(index)])]

    def batches(self, batch_size: int, labels: list[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 batches [b, S, S, 3] in order; their labels [b] are added to `labels`."""
        for batch in ordered_batches(self, image_size=self.size, batch_size=batch_size):
            labels.append(batch["label"])
            yield batch["image"]

    def fingerprint(self) -> str:
        """Names the set by its description and a few of its images."""
        digest = hashlib.sha256(f"{self.name} at {self.size}, {len(self.source)} in all".encode())
        for index in spread(len(self), PROBES):
            image, label = self[index]
            digest.update(np.ascontiguousarray(image).tobytes() + str(label).encode())
        return digest.hexdigest()[:16]


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices of `total`, evenly spread."""
    count = min(total, wanted)
    return np.arange(count) * total // count


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


def plan_reference(config: ConfigDict, network: Network) -> ReferencePlan:
    """What the images are to be compared with: those of `config.evaluate.reference`, or training images.

    Raises:
      RearError: the file or the data set is missing, damaged, or of no use as a reference; or the statistics are of
        other features than the network's.
    """
    settings, statistics = config.evaluate, None
    if settings.reference:
        images = ImageArchive(Path(settings.reference), remedy="give config.evaluate.reference another .npz")
        if network.extractor.name == "Inception" and set(STATISTICS) <= set(images.names):
            statistics = _read_statistics(images, network.extractor)
        elif not images.shape:
            raise RearError(f"{images.path} is no reference: it has neither images arr_0 nor statistics of Inception.")
        size = images.shape[1] if images.shape else 0
        name = f"{images.path.name}: {len(images)} images"
        content = images.fingerprint
    else:
        images = RealImages(config.data, config.data.train_split, settings.num_reference)
        name, size, content = images.name, images.size, images.fingerprint()
    decides = (content, network.weights, network.extractor.recipe, settings.num_compared)
    fingerprint = hashlib.sha256(repr(decides).encode()).hexdigest()[:16]
    return ReferencePlan(images, name, fingerprint, size, statistics)


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

    Raises:
      RearError: an image or statistic cannot be read, or is not fit for the network.
    """
    path = folder / f"reference-{plan.fingerprint}.npz"
    if path.exists():
        try:
            return scores.Reference.load(path)
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
            raise RearError(f"{path} cannot be read ({error}): delete it, it will be made again.") from error
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


class Reconstructions:
    """Images through the tokenizer, with what they lose on the way."""

    def __init__(self, tokenizer: artifacts.Tokenizer, network: PerceptualNetwork | None, to_8_bit: eight_bit.Rule):
        """Takes the tokenizer, LPIPS where its files are given, and the rule of the tokenizer's family."""
        self._tokenizer, self._network, self._to_8_bit = tokenizer, network, to_8_bit
        self._mesh = placement.make_mesh(placement.DATA_PARALLEL)
        lpips = network.params if network else {}
        self._params = jax.device_put((tokenizer.params, lpips), placement.replicated(self._mesh))
        self._codes: list[np.ndarray] = []
        self._differences: list[dict[str, np.ndarray]] = []
        self._rows = 0

    def over(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 images [b, S, S, 3] -> the same through the codes, as 8 bits; no batch is larger than the first."""
        reconstruct, differ = jax.jit(self._reconstruct), jax.jit(self._differ)
        for images in batches:
            count, devices = len(images), jax.device_count()
            self._rows = self._rows or -(-count // devices) * devices
            before = np.pad(images, ((0, self._rows - count), (0, 0), (0, 0), (0, 0)))
            codes, decoded = reconstruct(self._params[0], jax.device_put(before, placement.split(self._mesh)))
            after = np.asarray(decoded)
            pair = jax.device_put((before, after), placement.split(self._mesh))
            found = differ(self._params[1], *pair)
            self._codes.append(np.asarray(codes)[:count])
            self._differences.append({name: np.asarray(value)[:count] for name, value in found.items()})
            yield after[:count]

    def scores(self) -> dict[str, float]:
        """Means over the images that have passed: PSNR (dB), SSIM and LPIPS, then how the codebook was used."""
        names = self._differences[0]
        means = {name: float(np.concatenate([d[name] for d in self._differences]).mean()) for name in names}
        codes, size = np.concatenate(self._codes), self._tokenizer.module.codebook_size
        return means | {
            "codebook_usage": float(quantizer.codebook_usage(codes, size)),
            "codebook_perplexity": float(quantizer.perplexity(codes, size)),
        }

    def _reconstruct(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        apply = self._tokenizer.module.apply
        codes = apply({"params": params}, images.astype(jnp.float32) / 255.0, method="encode")
        return codes, self._to_8_bit(apply({"params": params}, codes, method="decode"))

    def _differ(self, params: Any, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
        pair = [images.astype(jnp.float32) / 255.0 for images in (before, after)]
        found = {"PSNR": psnr(*pair), "SSIM": ssim(*pair)}
        return found | ({"LPIPS": self._network.distance(params, *pair)} if self._network else {})


class Samples(NamedTuple):
    """A sampled set: its images, read in a stream, their labels [n], and the recipe that it was drawn by."""

    images: ImageArchive
    labels: np.ndarray
    recipe: dict | str


def open_samples(workdir: Path) -> Samples:
    """What `--job=sample` has left.

    Raises:
      RearError: it is missing or damaged, or holds fewer images than were asked for.
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


def not_comparable(network: Network, plan: ReferencePlan, samples: Samples | None, num_classes: int) -> list[str]:
    """Why the FID of these samples is no number to hold against published ones; empty where it is one."""
    if samples is None:
        return ["there are no samples"]
    (count, height, width, _), inception = samples.images.shape, network.extractor.name == "Inception"
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
