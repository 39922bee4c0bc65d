"""`--job=evaluate`: how far the samples are from real images, and what the tokenizer loses of held-out ones."""

import dataclasses
import importlib.metadata
import logging
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, tokenizers
from rear_jax.errors import RearError
from rear_jax.evaluation import reconstructions, reference, report, text_fit
from rear_jax.evaluation.label_scores import LabelScores, Nothing, label_scores
from rear_jax.evaluation.label_scores import recipe_of as recipe_of_labels
from rear_jax.evaluation.reference import RealImages, ReferencePlan
from rear_jax.evaluation.samples import Samples, not_comparable, open_samples
from rear_jax.metrics import scores
from rear_jax.metrics.features import Network, load_network
from rear_jax.metrics.perceptual import PerceptualNetwork, lpips_vgg16
from rear_jax.metrics.scores import Described
from rear_jax.metrics.statistics import frechet_distance
from rear_jax.metrics.text_scores import TextScorer
from rear_jax.runtime import places
from rear_jax.runtime.atomic import read_json, write_json
from rear_jax.runtime.identity import fingerprint, is_done
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import num_images
from rear_jax.training import objectives, sampled

log = logging.getLogger(__name__)

SAMPLES, HELD_OUT, DECODED = "samples", "held-out real images (the floor)", "held-out images through the tokenizer"
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scikit-learn", "pillow")


@dataclasses.dataclass(frozen=True)
class Compared:
    """What is scored, and what scores it; without samples, or without the tokenizer, these are None."""

    network: Network
    plan: ReferencePlan
    reconstructed: ReferencePlan | None
    samples: Samples | None
    held_out: RealImages | None
    tokenizer: artifacts.Tokenizer | None
    lpips: PerceptualNetwork | None
    text_scorers: dict[str, TextScorer]


def run(config: ConfigDict, workdir: Path, place: Path | None = None) -> None:
    """Scores `samples.npz`; writes `scores.json`, `report.md` and `report.html`.

    The samples are compared with the reference; so are, as the floor, as many held-out real images, and the same images
    after the tokenizer, which no generator on its codes is likely to beat. These are also compared with their
    originals, as a set (rFID) and one by one (PSNR, SSIM, and LPIPS with the files of `config.lpips`). Without
    `samples.npz` the latter is all that there is to do; without `config.evaluate.tokenizer` it is left out.

    Samples that were drawn for prompts get a CLIP score and HPSv2 too, by the files of `config.clip` and `config.hps`.

    The tokenizer and the kept references are in `workdir`; the samples are in `place`, and the scores go there, if it
    is not the same folder.
    """
    place = place or workdir
    given = gather(config, workdir, place)
    recipe = make_recipe(config, given)
    scored, page = is_done(place / "scores.json", {"recipe": recipe}), place / "report.html"
    if scored and page.exists():
        log.info("evaluate: done already, see %s", place / "report.md")
        return
    if not scored:
        found = score_all(config, workdir, place, given)
        page.unlink(missing_ok=True)  # it is of other scores
        write_json(place / "scores.json", {"scores": found, "recipe": recipe})
    result = read_json(place / "scores.json")
    report.write(place, result)
    log.info("evaluate: wrote %s, with the recipe of the scores\n%s", place / "report.md", report.text_table(result))


def gather(config: ConfigDict, workdir: Path, place: Path) -> Compared:
    """Opens what the evaluation needs, and says in one line what it is going to be of."""
    _check_settings(config)
    settings, samples = config.evaluate, _samples(config, place)
    what = {SAMPLES: samples is not None, "the tokenizer on held-out images": settings.tokenizer}
    log.info("evaluate: scoring %s", " and ".join(name for name, wanted in what.items() if wanted))
    network = load_network(settings)
    plan = reference.plan_reference(config, network)
    held_out = _held_out(config, network, plan, samples.images.shape if samples else None)
    tokenizer = lpips = reconstructed = None
    if settings.tokenizer or settings.reconstructed_reference:
        tokenizer = sampled.load_tokenizer(config, workdir)
    if settings.tokenizer:
        lpips = _lpips(config)
    if settings.reconstructed_reference and samples:
        reconstructed = reconstructions.plan(config, tokenizer, network)
        scores.require_size(reconstructed.name, reconstructed.size, *samples.images.shape[1:3])
    return Compared(network, plan, reconstructed, samples, held_out, tokenizer, lpips, text_fit.scorers(config))


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    _check_settings(config)
    if "sample" in before:
        network = objectives.build_generator(config, artifacts.outline_tokenizer(config).module)
        shape = num_images(config, network), *draw.image_shape(config)
    else:
        samples = _samples(config, workdir)
        shape = samples.images.shape if samples else None
    text_fit.check(config)
    network = reference.outline_network(config.evaluate)
    _held_out(config, network, reference.plan_reference(config, network), shape)
    if config.evaluate.tokenizer or config.evaluate.reconstructed_reference:
        sampled.check_tokenizer(config, workdir, before)
    if config.evaluate.reconstructed_reference and shape:
        scores.require_size("reconstructions", config.data.image_size, *shape[1:3])
    if config.evaluate.tokenizer:
        _lpips(config)


def _check_settings(config: ConfigDict) -> None:
    if config.evaluate.batch_size < 1:
        raise RearError(f"config.evaluate.batch_size = {config.evaluate.batch_size}: choose at least 1.")


def _samples(config: ConfigDict, place: Path) -> Samples | None:
    """The samples in a folder, None where there are none; raises RearError where there is nothing else to score."""
    if (place / "samples.npz").exists():
        samples = open_samples(place)
        _require_prompts(samples, len(text_fit.prompts_in(place)), place)
        return samples
    if not config.evaluate.tokenizer:
        raise RearError(f"{place / 'samples.npz'} does not exist: run --job=sample first.")
    return None


def _require_prompts(samples: Samples, count: int, place: Path) -> None:
    """Raises RearError where samples lie beside prompts that they were not drawn for."""
    if count and samples.labels is not None and samples.labels.max() >= count:
        raise RearError(
            f"{place / 'prompts.jsonl'} holds {count} prompts, a label in samples.npz is {samples.labels.max()}: it is "
            "of another set of samples, remove it."
        )


def _held_out(
    config: ConfigDict, network: Network, plan: ReferencePlan, samples: tuple[int, ...] | None
) -> RealImages | None:
    """The images that the tokenizer is scored on, None where it is left out; `samples` [n, H, W, 3] is their shape.

    Raises RearError: samples or held-out images do not compare with the reference, or are too few.
    """
    settings = config.evaluate
    if samples:
        reference.require_scores(plan, network.extractor, settings, samples)
    if not settings.tokenizer:
        return None
    held_out = RealImages(config.data, config.data.eval_split, samples[0] if samples else settings.num_reference)
    if _fits(plan, held_out):
        reference.require_scores(plan, network.extractor, settings, held_out.shape)
    return held_out


def _lpips(config: ConfigDict) -> PerceptualNetwork | None:
    """The network of the LPIPS score, None where no file is given."""
    return lpips_vgg16(config.lpips, wanted_by="the LPIPS score") if any(config.lpips.values()) else None


def _fits(plan: ReferencePlan, held_out: RealImages) -> bool:
    """Whether held-out images can be compared with the reference: samples may be of another size than the data."""
    return plan.size in (0, held_out.size)


def make_recipe(config: ConfigDict, given: Compared) -> dict:
    """Everything the scores depend on."""
    settings, network, plan = config.evaluate, given.network, given.plan
    reasons = not_comparable(network, plan, given.samples, config.data.num_classes)
    recipe = {
        **reference.recipe_of(settings, network, plan),
        "comparable_with_published_FID": not reasons,
        "not_comparable_because": reasons,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    if not network.extractor.fid:
        recipe |= recipe_of_labels(config.data)
    if given.samples:
        count, height, width, _ = given.samples.images.shape
        recipe["samples_file"] = f"{count} images of {height}x{width}, content {given.samples.images.fingerprint}"
        recipe["samples"] = given.samples.recipe
    if given.reconstructed:
        recipe["reconstructed_reference"] = f"{given.reconstructed.name}, {given.reconstructed.fingerprint}"
    if given.held_out:
        recipe["held_out"] = (
            f"{given.held_out.name}, {given.held_out.size} pixels, content {given.held_out.fingerprint()}"
        )
        recipe["tokenizer"] = f"{given.tokenizer.origin}, {given.tokenizer.fingerprint}"
        recipe["decoder"] = given.tokenizer.decoder_fingerprint
        module = given.tokenizer.module
        recipe["reconstructions"] = (
            f"{config.tokenizer.dtype} at precision {module.precision!r}; "
            f"8-bit images ({tokenizers.family_of(module).to_8_bit.__name__}); "
            "PSNR, SSIM (11x11 Gaussian window, 1.5), LPIPS: means over images"
        )
    for name, scorer in given.text_scorers.items():
        recipe[name] = f"{scorer.recipe}; weights {scorer.weights}; mean cosine of samples and their prompts"
    if given.lpips:
        recipe["lpips"] = f"VGG16 with learned heads; weights {fingerprint(given.lpips.params, {})}"
    return recipe


def score_all(config: ConfigDict, workdir: Path, place: Path, given: Compared) -> dict[str, dict[str, float]]:
    """Set of images -> its scores."""
    settings, extractor = config.evaluate, given.network.extractor
    folder = places.place(settings.cache) if settings.cache else workdir / "references"
    real = reference.prepare_reference(given.plan, extractor, settings, folder)
    by_label = Nothing() if extractor.fid else label_scores(config, place, real, drawn=SAMPLES)

    def compare(described: Described, labels: np.ndarray | None, name: str) -> dict[str, float]:
        found = scores.compare(real, described, extractor, reference.score_settings(settings))
        return found | by_label.scores(name, described.pooled, labels)

    found = {}
    if given.samples:
        images, labels, _ = given.samples
        batches = by_label.watched(images.batches(settings.batch_size), SAMPLES)
        described = reference.describe(batches, len(images), extractor, SAMPLES)
        found[SAMPLES] = compare(described, labels, SAMPLES)
        if given.reconstructed:
            after = reference.prepare_reference(given.reconstructed, extractor, settings, folder)
            found[SAMPLES] |= reconstructions.distance(after, described, extractor)
        if labels is not None and (prompts := text_fit.prompts_in(place)):
            found[SAMPLES] |= text_fit.scores(given.text_scorers, images, labels, prompts, settings.batch_size)
    if given.held_out:
        compared = compare if _fits(given.plan, given.held_out) else lambda *_: {}
        found |= score_tokenizer(config, given, by_label, compared)
    return found


def score_tokenizer(
    config: ConfigDict,
    given: Compared,
    by_label: LabelScores,
    compare: Callable[[Described, np.ndarray, str], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """The scores of held-out images and of what the tokenizer makes of them; `compare` is with the reference."""
    held_out, extractor, labels = given.held_out, given.network.extractor, []
    batch_size = config.evaluate.batch_size
    batches = by_label.watched(held_out.batches(batch_size, labels), HELD_OUT)
    real = reference.describe(batches, len(held_out), extractor, HELD_OUT)
    through = reconstructions.Reconstructions(given.tokenizer, given.lpips)
    again = by_label.watched(through.over(held_out.batches(batch_size, [])), DECODED)
    decoded = reference.describe(again, len(held_out), extractor, DECODED)
    distance = frechet_distance(scores.moments(decoded.pooled), scores.moments(real.pooled))
    classes = np.concatenate(labels)
    own = {f"r{scores.distance_name(extractor)}": distance} | through.scores()
    return {HELD_OUT: compare(real, classes, HELD_OUT), DECODED: compare(decoded, classes, DECODED) | own}
