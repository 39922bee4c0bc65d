"""CLIP score and HPSv2 of samples that were drawn for prompts, by the user's own files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.archive import ImageArchive
from rear_jax.data.prompts import HPS_STYLES, Prompt, read_prompts
from rear_jax.metrics import clip_files, text_scores
from rear_jax.metrics.text_scores import TextScorer
from rear_jax.runtime.progress import ProgressBar
from rear_jax.text import clip_vocabulary
from rear_jax.weights.shards import open_weights

CLIP, HPS = "CLIP", "HPSv2"  # as the scores are called


def check(config: ConfigDict) -> None:
    """Raises RearError where `scorers` will refuse a file."""
    for weights in filter(None, (config.clip.weights, config.hps.weights)):
        clip_files.network_of(open_weights(weights), source=weights)
        clip_vocabulary.load(config.clip.vocabulary)


def scorers(config: ConfigDict) -> dict[str, TextScorer]:
    """Name of a score -> what it is computed with, for those whose weights are given.

    Raises RearError: a file is missing, damaged, or of another network.
    """
    found = {}
    if config.clip.weights:
        found[CLIP] = text_scores.load_clip(config.clip.weights, config.clip.vocabulary, prefix=config.clip.prefix)
    if config.hps.weights:
        found[HPS] = text_scores.load_hps(config.hps.weights, config.clip.vocabulary, antialias=config.hps.antialias)
    return found


def prompts_in(place: Path) -> list[Prompt]:
    """The prompts that the samples in a folder were drawn for; none where they were drawn for something else."""
    file = place / "prompts.jsonl"
    return read_prompts(file) if file.exists() else []


def scores(
    found: dict[str, TextScorer], images: ImageArchive, labels: np.ndarray, prompts: Sequence[Prompt], batch_size: int
) -> dict[str, float]:
    """Mean cosine of images and prompts by each scorer; of HPSv2's own prompts also the table of its benchmark.

    Args:
      found: from `scorers`.
      images: n of them.
      labels: [n], numbers of `prompts`.
      prompts: the texts.
      batch_size: images at once.
    """
    texts = [prompts[label].text for label in labels.tolist()]

    def batches(name: str) -> Iterator[tuple[np.ndarray, list[str]]]:
        start = 0
        with ProgressBar(f"evaluate {name}", total=len(images), unit="image") as bar:
            for batch in bar.over(images.batches(batch_size)):
                yield batch, texts[start : start + len(batch)]
                start += len(batch)

    result = {}
    for name, scorer in found.items():
        cosines = np.concatenate(list(scorer.scores(batches(name))))
        result[name] = float(cosines.mean(dtype=np.float64))
        if name == HPS:
            result |= _benchmark(cosines, np.array([prompts[label].category for label in labels.tolist()]))
    return result


def _benchmark(cosines: np.ndarray, styles: np.ndarray) -> dict[str, float]:
    """HPSv2's table, where all images are of its styles; {} elsewhere."""
    if not set(styles.tolist()) <= set(HPS_STYLES):
        return {}
    table = text_scores.hps_benchmark({style: cosines[styles == style] for style in dict.fromkeys(styles.tolist())})
    return {f"{HPS} {style}": value for style, value in table.items()}
