"""What a set is drawn for: classes, captions whose features are in a file, or prompts."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data.captions import CaptionFile, CaptionShards, open_captions
from rear_jax.data.prompts import Prompt, given_prompts
from rear_jax.data.sources import open_split
from rear_jax.data.sources.interface import captioned, spread
from rear_jax.errors import RearError
from rear_jax.runtime.identity import fingerprint


class Conditions(NamedTuple):
    """All conditions of a set, by number.

    Attributes:
      look_up: numbers [U] -> what the generator takes, a tree of arrays [U, ...].
      count: how many there are.
      labels: of each image of the set, the number of its condition.
      prompts: the texts, where the conditions are prompts.
      recipe: what the set depends on by them.
    """

    look_up: Callable[[np.ndarray], Any]
    count: int
    labels: np.ndarray
    prompts: tuple[Prompt, ...]
    recipe: dict[str, Any]


def open_conditions(config: ConfigDict, workdir: Path, model: nn.Module) -> Conditions:
    """The conditions of `config.sample`; features of prompts are computed when they are asked for.

    Raises RearError: as `check_conditions`.
    """
    settings = config.sample
    if not generators.takes_text(model):
        prompts_of(config, model)  # refuses them
        classes = np.arange(config.data.num_classes, dtype=np.int32)
        recipe = {"labels": "balanced: index modulo the number of classes"}
        return Conditions(classes.__getitem__, len(classes), labels_of(settings, 0, len(classes)), (), recipe)
    if prompts := prompts_of(config, model):
        reader = artifacts.open_text_reader(config, workdir, model)
        texts = [prompt.text for prompt in prompts]
        recipe = {
            "labels": f"prompt by prompt, {settings.images_per_prompt} images of each",
            "prompts": fingerprint({}, {"prompts": texts}),
            "text_encoder": reader.fingerprint,
        }
        labels = labels_of(settings, len(texts), 0)

        def look_up(numbers: np.ndarray) -> Any:
            return reader.encode([texts[number] for number in numbers.tolist()])

        return Conditions(look_up, len(texts), labels, tuple(prompts), recipe)
    captions = _captions(config, model)
    recipe = {"labels": "balanced: index modulo the number of captions", "captions": _name(captions)}
    return Conditions(captions.__getitem__, len(captions), labels_of(settings, 0, len(captions)), (), recipe)


def check_conditions(config: ConfigDict, workdir: Path, model: nn.Module, before: Collection[str] = ()) -> None:
    """Raises RearError where the file of captions or prompts, or what reads them, is of no use."""
    if prompts_of(config, model):
        artifacts.check_text_encoder(config, workdir, model, before)
        if generators.reads_tokens(model):
            texts = [prompt.text for prompt in given_prompts(config.sample)]
            artifacts.open_vocabulary(config, model).encode(texts, artifacts.text_length(config, model))
    elif generators.takes_text(model):
        _captions(config, model)


def prompts_of(config: ConfigDict, model: nn.Module) -> list[Prompt]:
    """The prompts of `config.sample`, else the captions of held-out images; none where there is neither.

    Raises RearError: as `given_prompts`; the generator takes classes; or there are features of captions as well.
    """
    settings, prompts = config.sample, given_prompts(config.sample)
    option = "config.sample.prompts" if settings.prompts else "config.sample.prompt"
    if prompts and not generators.takes_text(model):
        raise RearError(f"{option} is set, and this generator takes classes: set config.model.condition = 'text'.")
    if settings.captions and generators.reads_tokens(model):
        raise RearError(
            "config.sample.captions has features, and this generator reads text: set config.sample.prompts."
        )
    if prompts and settings.captions:
        raise RearError(f"config.sample.captions and {option} are both set: set one of them to ''.")
    if prompts or settings.captions or not generators.takes_text(model):
        return prompts
    prompts = _held_out_captions(config)
    if not prompts and generators.reads_tokens(model):
        raise RearError("There are no prompts: set config.sample.prompts or prompt, or use images that have captions.")
    return prompts


def num_images(config: ConfigDict, model: nn.Module) -> int:
    """Images in the set: `config.sample.num_images`, or as many as its prompts ask for."""
    return len(prompts_of(config, model)) * config.sample.images_per_prompt or config.sample.num_images


def labels_of(settings: ConfigDict, num_prompts: int, num_conditions: int) -> np.ndarray:
    """Label of each image of the set: balanced, or with prompts their numbers in order, each repeated."""
    if num_prompts:
        return np.repeat(np.arange(num_prompts, dtype=np.int32), settings.images_per_prompt)
    return balanced_labels(settings.num_images, num_conditions)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """Label of each sample by its global index alone: every prefix of the set is as balanced as it can be."""
    return (np.arange(count) % num_classes).astype(np.int32)


def _held_out_captions(config: ConfigDict) -> list[Prompt]:
    """As many captions of held-out images, evenly spread, as the set has images for; none where these have none."""
    settings, data = config.sample, config.data
    try:
        source = open_split(data, data.eval_split)
    except RearError as error:
        raise RearError(
            "config.sample.prompts, prompt and captions are '', and there are no held-out images whose captions could "
            f"take their place ({error}): set one of them."
        ) from error
    if not captioned(source):
        return []
    numbers = spread(len(source), -(-settings.num_images // settings.images_per_prompt))
    return [Prompt(source.caption(number)) for number in numbers.tolist()]


def _captions(config: ConfigDict, model: nn.Module) -> CaptionFile | CaptionShards:
    return open_captions(
        config.sample.captions, option="config.sample.captions", length=model.caption_length, dim=model.caption_dim
    )


def _name(captions: CaptionFile | CaptionShards) -> str:
    """Tells features apart."""
    if isinstance(captions, CaptionShards):
        return f"{captions.header.captions} by {captions.header.encoder}"
    return fingerprint(captions[:]._asdict(), {})
