"""`--job=evaluate`: how far the samples are from real images, on the features of a pretrained network."""

import importlib.metadata
import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, report
from rear_jax.convert import efficientnet as efficientnet_weights
from rear_jax.data.batches import ordered_batches
from rear_jax.data.images import ImageSource, open_source
from rear_jax.errors import RearError
from rear_jax.metrics.features import FeatureExtractor, efficientnet_extractor, extract
from rear_jax.metrics.precision_recall import precision_recall
from rear_jax.metrics.probe import fit_probe
from rear_jax.metrics.statistics import Gaussian, GaussianStatistics, frechet_distance
from rear_jax.pictures import to_uint8
from rear_jax.progress import ProgressBar
from rear_jax.training import perceptual

log = logging.getLogger(__name__)

SAMPLES, HELD_OUT, DECODED = "samples", "held-out real images (the floor)", "held-out images through the tokenizer"
LIBRARIES = ("jax", "flax", "numpy", "scikit-learn", "pillow")


def run(config: ConfigDict, workdir: Path) -> None:
    """Scores `samples.npz`; writes `scores.json` and `report.md`.

    The samples are compared with training images; so are, as the floor, as many held-out real images, and the same
    images after the tokenizer, which no generator on its codes is likely to beat. With the files of `config.lpips` the
    latter are also compared with their originals, image by image.
    """
    settings, data = config.evaluate, config.data
    samples, labels = _load_samples(workdir / "samples.npz")
    train = open_source(data.source, data.path, data.train_split)
    held_out = open_source(data.source, data.path, data.eval_split)
    tokenizer = artifacts.load_tokenizer(config, workdir, stage=config.sample.stage)
    extractor = efficientnet_extractor(
        efficientnet_weights.load(settings.network), settings.network, settings.feature_size
    )
    of_train = spread(len(train), settings.num_reference)
    of_held_out = spread(len(held_out), len(samples))
    network = perceptual.lpips_vgg16(config.lpips, wanted_by="the LPIPS score") if any(config.lpips.values()) else None
    recipe = make_recipe(config, workdir, extractor, len(of_train), len(of_held_out))
    if network:
        weights = artifacts.fingerprint(network.params, {})
        recipe["lpips"] = f"VGG16 with learned heads, 8-bit images, mean over the held-out ones; weights {weights}"
    if artifacts.is_done(workdir / "scores.json", {"recipe": recipe}):
        log.info("evaluate: done already, see %s", workdir / "report.md")
        return

    size, batch_size = data.image_size, settings.batch_size
    reference, reference_labels = real_features(extractor, train, of_train, size, batch_size, "reference")
    real, real_labels = real_features(extractor, held_out, of_held_out, size, batch_size, HELD_OUT)
    through, distances = _reconstructor(tokenizer), []
    if network:
        through = _compared(through, network, distances)
    decoded, _ = real_features(extractor, held_out, of_held_out, size, batch_size, DECODED, through=through)
    with ProgressBar("evaluate samples", total=len(samples), unit="image") as bar:
        cuts = (samples[i : i + batch_size] for i in range(0, len(samples), batch_size))
        generated = extract(extractor, bar.over(cuts))

    target, probe = gaussian(reference), fit_probe(reference, reference_labels)
    rows = {SAMPLES: (generated, labels), HELD_OUT: (real, real_labels), DECODED: (decoded, real_labels)}
    scores = {}
    for name, (features, classes) in rows.items():
        precision, recall = precision_recall(reference, features, settings.neighbours)
        scores[name] = {
            f"FD-{extractor.name}": frechet_distance(gaussian(features), target),
            "precision": precision,
            "recall": recall,
            "class_accuracy": probe.accuracy(features, classes),
        }
        if name == DECODED and network:
            scores[name]["LPIPS"] = float(np.concatenate(distances).mean())
        log.info("evaluate: %s: %s", name, "  ".join(f"{k} {v:.4g}" for k, v in scores[name].items()))
    result = {"scores": scores, "recipe": recipe}
    artifacts.write_json(workdir / "scores.json", result)
    report.write(workdir, result)
    log.info("evaluate: wrote %s; the recipe of its scores: %s", workdir / "report.md", json.dumps(recipe))


def make_recipe(config: ConfigDict, workdir: Path, extractor: FeatureExtractor, reference: int, held_out: int) -> dict:
    """Everything the scores depend on."""
    data, settings = config.data, config.evaluate
    drawn_by = workdir / "samples.json"
    return {
        "features": extractor.recipe,
        "reference": f"{reference} images of {data.source} {data.path}/{data.train_split}, evenly spread, centre crop",
        "held_out": f"{held_out} images of {data.source} {data.path}/{data.eval_split}, evenly spread, centre crop",
        "image_size": data.image_size,
        "precision_recall_neighbours": settings.neighbours,
        "class_accuracy": "logistic regression on the reference's features and labels",
        "comparable_with_published_FID": False,
        "samples": json.loads(drawn_by.read_text()) if drawn_by.exists() else "unknown: no samples.json beside them",
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices of `total`, evenly spread, so that a set sorted by class stays balanced."""
    count = min(total, wanted)
    return np.arange(count) * total // count


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features [n, D], in float64."""
    return GaussianStatistics.empty(features.shape[1]).update(features).finish()


def real_features(
    extractor: FeatureExtractor,
    source: ImageSource,
    indices: np.ndarray,
    size: int,
    batch_size: int,
    name: str,
    *,
    through: Callable[[np.ndarray], np.ndarray] = lambda images: images,
) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, D] and labels [n] of some images of a source, each passed `through` something first."""
    labels = []

    def images() -> Iterator[np.ndarray]:
        for batch in ordered_batches(_Subset(source, indices), image_size=size, batch_size=batch_size):
            labels.append(batch["label"])
            yield through(batch["image"])

    with ProgressBar(f"evaluate {name}", total=len(indices), unit="image") as bar:
        features = extract(extractor, bar.over(images()))
    return features, np.concatenate(labels)


class _Subset:
    """Some images of a source."""

    def __init__(self, source: ImageSource, indices: Iterable[int]):
        self._source, self._indices = source, [int(i) for i in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index) -> tuple[np.ndarray, int]:
        return self._source[self._indices[int(index)]]


def _reconstructor(tokenizer: artifacts.Tokenizer) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images -> uint8 images that went through the codes."""

    @jax.jit
    def reconstruct(params, images):
        codes = tokenizer.module.apply({"params": params}, images.astype(jnp.float32) / 255.0, method="encode")
        return tokenizer.module.apply({"params": params}, codes, method="decode")

    return lambda images: to_uint8(np.asarray(reconstruct(tokenizer.params, images)))


def _compared(
    through: Callable[[np.ndarray], np.ndarray], network: perceptual.PerceptualNetwork, distances: list[np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
    """`through`, which also adds to `distances` how far each batch of uint8 images is from what becomes of it, [b]."""

    @jax.jit
    def distance(params, before, after):
        return network.distance(params, *(images.astype(jnp.float32) / 255.0 for images in (before, after)))

    def compare(images: np.ndarray) -> np.ndarray:
        result = through(images)
        distances.append(np.asarray(distance(network.params, images, result)))
        return result

    return compare


def _load_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, H, W, 3] uint8 and labels [n] of a sampled set."""
    try:
        with np.load(path) as file:
            return file["arr_0"], file["labels"]
    except FileNotFoundError:
        raise RearError(f"{path} does not exist: run --job=sample first.") from None
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RearError(f"{path} cannot be read ({error}): delete it and run --job=sample again.") from error
