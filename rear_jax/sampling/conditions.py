"""What a set is drawn for: classes, captions whose features are in a file, or prompts."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data.captions import CaptionFile, CaptionShards, open_captions
from rear_jax.data.class_names import class_numbers
from rear_jax.data.prompts import Prompt, given_prompts
from rear_jax.data.sources import open_split
from rear_jax.data.sources.interface import captioned, spread
from rear_jax.errors import RearError
from rear_jax.runtime.identity import fingerprint

SCORED_SET = 50_000  # images of a set whose size nothing says, where a job scores it
FEW = 10  # classes or captions of a set that is only looked at


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
        classes, labels = np.arange(config.data.num_classes, dtype=np.int32), labels_of_classes(config)
        recipe = _balanced("classes") if _is_balanced(settings) else _class_by_class(settings, labels)
        return Conditions(classes.__getitem__, len(classes), labels, (), recipe)
    _refuse_classes(settings)
    if prompts := prompts_of(config, model):
        reader = artifacts.open_text_reader(config, workdir, model)
        texts = [prompt.text for prompt in prompts]
        recipe = {
            "labels": f"prompt by prompt, {settings.images_per_prompt} images of each",
            "prompts": fingerprint({}, {"prompts": texts}),
            "text_encoder": reader.fingerprint,
        }

        def look_up(numbers: np.ndarray) -> Any:
            return reader.encode([texts[number] for number in numbers.tolist()])

        return Conditions(look_up, len(texts), labels_of_prompts(settings, len(texts)), tuple(prompts), recipe)
    captions = _captions(config, model)
    if count := settings.num_images:
        labels, recipe = balanced_labels(count, len(captions)), _balanced("captions")
    else:
        labels = np.repeat(spread(len(captions), FEW).astype(np.int32), settings.images_per_prompt)
        recipe = {"labels": f"{FEW} captions at most, evenly spread, {settings.images_per_prompt} images of each"}
    return Conditions(captions.__getitem__, len(captions), labels, (), recipe | {"captions": _name(captions)})


def check_conditions(config: ConfigDict, workdir: Path, model: nn.Module, before: Collection[str] = ()) -> None:
    """Raises RearError where the file of captions or prompts, or what reads them, is of no use."""
    if prompts_of(config, model):
        artifacts.check_text_encoder(config, workdir, model, before)
        if generators.reads_tokens(model):
            texts = [prompt.text for prompt in given_prompts(config.sample)]
            artifacts.open_vocabulary(config, model).encode(texts, artifacts.text_length(config, model))
    elif generators.takes_text(model):
        _captions(config, model)
    if generators.takes_text(model):
        _refuse_classes(config.sample)
    else:
        labels_of_classes(config)


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
    """Images in the set; where captions are in a file and nothing says how many images, at most so many."""
    if generators.takes_text(model):
        few = FEW * config.sample.images_per_prompt
        return len(prompts_of(config, model)) * config.sample.images_per_prompt or config.sample.num_images or few
    return len(labels_of_classes(config))


def scored(config: ConfigDict) -> ConfigDict:
    """A copy with a size for its set of samples, if it says none: that of sets that are scored."""
    copy = config.copy_and_resolve_references()
    copy.sample.num_images = config.sample.num_images or SCORED_SET
    return copy


def labels_of_classes(config: ConfigDict) -> np.ndarray:
    """Class of each image of a set that is drawn for classes, int32; raises RearError where one is unknown."""
    settings, data = config.sample, config.data
    if _is_balanced(settings):
        return balanced_labels(settings.num_images, data.num_classes)
    few = class_numbers(settings.classes, data) if settings.classes else spread(data.num_classes, FEW)
    return np.repeat(few.astype(np.int32), settings.images_per_class)


def labels_of_prompts(settings: ConfigDict, num_prompts: int) -> np.ndarray:
    """Number of the prompt of each image: prompt by prompt."""
    return np.repeat(np.arange(num_prompts, dtype=np.int32), settings.images_per_prompt)


def _is_balanced(settings: ConfigDict) -> bool:
    """Whether the set is of all classes."""
    return not settings.classes and settings.num_images > 0


def _balanced(over: str) -> dict[str, Any]:
    return {"labels": f"balanced: index modulo the number of {over}"}


def _class_by_class(settings: ConfigDict, labels: np.ndarray) -> dict[str, Any]:
    each = settings.images_per_class
    return {"labels": f"class by class, {each} images of each", "classes": labels[::each].tolist()}


def _refuse_classes(settings: ConfigDict) -> None:
    if settings.classes:
        raise RearError("config.sample.classes is set, and this generator takes text: set config.sample.prompt.")


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
    numbers = spread(len(source), -(-settings.num_images // settings.images_per_prompt) or FEW)
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
