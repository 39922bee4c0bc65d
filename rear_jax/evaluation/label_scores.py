"""How many images are what they were drawn for: of the class that was asked for, or as their prompts say.

Prompts can be checked where pixels tell whether they are true. So far that holds for the captions of
`data/fashion_captions.py`. An image matches its prompt where the garment that a linear probe sees in it is that of the
prompt, and where it is as bright and as wide, for that garment, as the prompt says.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from rear_jax.data import fashion_captions
from rear_jax.data.fashion_captions import Claim, claim_of
from rear_jax.data.prompts import read_prompts
from rear_jax.data.sources import open_split
from rear_jax.data.sources.interface import ImageSource, captioned
from rear_jax.metrics.probe import fit_probe
from rear_jax.metrics.scores import Reference

log = logging.getLogger(__name__)


class LabelScores(Protocol):
    """Scores of sets of images by their labels."""

    def watched(self, batches: Iterable[np.ndarray], name: str) -> Iterable[np.ndarray]:
        """The same batches uint8 [b, H, W, 3] of the set `name`, of which it may keep something."""
        ...

    def scores(self, name: str, features: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """Of the set `name`, with features [n, D] and labels [n], or None where nobody knows them."""
        ...


def label_scores(config: ConfigDict, place: Path, real: Reference, *, drawn: str) -> LabelScores:
    """What can be told of images by their labels: that depends on what the labels of the data are.

    Args:
      config: the experiment.
      place: where the samples are, with their prompts.
      real: training images with their labels.
      drawn: name of the set of samples.
    """
    if not len(real.labels):
        return Nothing()
    source = open_split(config.data, config.data.train_split)
    if not captioned(source):
        return _class_accuracy(real)
    prompts = place / "prompts.jsonl"
    if not _tell(source) or not prompts.exists():
        return Nothing()
    said = {drawn: [claim_of(prompt.text) for prompt in read_prompts(prompts)]}
    return PromptMatch(real, source.claims, said, open_split(config.data, config.data.eval_split).claims)


def _class_accuracy(real: Reference) -> LabelScores:
    """Nothing where there is but one class to tell."""
    if np.unique(real.labels).size < 2:
        log.info("evaluate: the reference is all of one class: class_accuracy is left out")
        return Nothing()
    return ClassAccuracy(real)


def recipe_of(data: ConfigDict) -> dict[str, str]:
    """How these scores are made; a part of the recipe of all scores."""
    probe = "logistic regression on the reference's features"
    source = open_split(data, data.train_split)
    if not captioned(source):
        return {"class_accuracy": f"{probe} and labels"}
    return {"prompt_match": f"{probe} and garments; brightness and breadth from pixels"} if _tell(source) else {}


def _tell(source: ImageSource) -> bool:
    """Whether the captions of a source say what can be seen."""
    return hasattr(source, "claims")


class Nothing:
    """Where labels tell nothing."""

    def watched(self, batches: Iterable[np.ndarray], name: str) -> Iterable[np.ndarray]:
        """See `LabelScores`."""
        return batches

    def scores(self, name: str, features: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """See `LabelScores`."""
        return {}


class ClassAccuracy(Nothing):
    """Labels are classes, which a linear probe knows from training images."""

    def __init__(self, real: Reference):
        self._probe = fit_probe(real.features, real.labels)

    def scores(self, name: str, features: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """See `LabelScores`; {} where a class was never seen, whose images could not be right."""
        if labels is None:
            return {}
        unseen = np.setdiff1d(labels, self._probe.classifier.classes_)
        if unseen.size:
            log.warning(
                "evaluate: %s: %d of its classes, such as %d, are in no image of the reference: class_accuracy is left "
                "out",
                *(name, unseen.size, unseen[0]),
            )
            return {}
        return {"class_accuracy": self._probe.accuracy(features, labels)}


class PromptMatch(Nothing):
    """Labels are numbers of captions that say what can be seen."""

    def __init__(
        self, real: Reference, truths: Sequence[Claim], said: dict[str, Sequence[Claim]], others: Sequence[Claim]
    ):
        """Fits the probe of garments.

        Args:
          real: training images, whose labels are numbers of `truths`.
          truths: what the captions of the training images say.
          said: name of a set -> what the captions say that its labels are numbers of.
          others: the same of all sets that are not named.
        """
        self._said, self._others = said, others
        self._probe = fit_probe(real.features, np.array([truths[label].garment for label in real.labels.tolist()]))
        self._seen: dict[str, list[np.ndarray]] = {}

    def watched(self, batches: Iterable[np.ndarray], name: str) -> Iterator[np.ndarray]:
        """See `LabelScores`."""
        seen = self._seen[name] = []
        for batch in batches:
            grey = np.round(batch.mean(axis=3)).astype(np.uint8)
            seen.append(fashion_captions.measures(grey))
            yield batch

    def scores(self, name: str, features: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
        """See `LabelScores`. By chance is the share among all pairs of an image and a prompt of the set."""
        if labels is None:
            return {}
        claims = [self._said.get(name, self._others)[label] for label in labels.tolist()]
        garments = self._probe.classifier.predict(np.asarray(features, np.float64))
        more = np.concatenate(self._seen[name]) > fashion_captions.medians()[garments]
        shown = [Claim(int(garment), *map(bool, both)) for garment, both in zip(garments, more, strict=True)]
        agree = np.array(shown) == np.array(claims)  # [n, 3]
        said, showing = Counter(claims), Counter(shown)
        return {
            "prompt_match": float(agree.all(axis=1).mean()),
            "prompt_match_by_chance": sum(showing[one] * said[one] for one in showing) / len(claims) ** 2,
            "garment_match": float(agree[:, 0].mean()),
            "brightness_match": float(agree[:, 1].mean()),
            "breadth_match": float(agree[:, 2].mean()),
        }
