"""Drawing images of given labels: which go together in a batch, and the one program that draws a batch."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts import Tokenizer
from rear_jax.data.captions import CaptionFile, CaptionShards, open_captions
from rear_jax.data.prompts import Prompt, given_prompts
from rear_jax.data.sources import open_split
from rear_jax.data.sources.interface import captioned, spread
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.runtime.identity import fingerprint
from rear_jax.runtime.mesh import fetch, split
from rear_jax.sampling.generate import generate, sampler_of
from rear_jax.sampling.resize import bicubic


class Batch(NamedTuple):
    """What one compiled call draws: B images of at most U distinct classes (or captions, by number).

    Attributes:
      indices: [B] global sample indices; a short last batch repeats its last one.
      classes: [U] distinct labels, padded by repeating the last.
      rows: [B] index into `classes`.
      count: how many of the B are wanted.
    """

    indices: np.ndarray
    classes: np.ndarray
    rows: np.ndarray
    count: int


def conditions_of(config: ConfigDict, model: nn.Module) -> Any:
    """All conditions there are, a tree of arrays whose leading axis is the label.

    These are classes, captions from a file, or prompts.
    """
    if prompts := prompts_of(config, model):
        return encode_prompts(config, model, [prompt.text for prompt in prompts])
    if generators.takes_captions(model):
        return _captions(config, model)[:]
    return np.arange(config.data.num_classes, dtype=np.int32)


def check_conditions(config: ConfigDict, model: nn.Module) -> None:
    """Raises RearError where the file of captions or prompts, or the text encoder, of `conditions_of` is of no use."""
    if prompts_of(config, model):
        check_encoder(config)
    elif generators.takes_captions(model):
        _captions(config, model)


def prompts_of(config: ConfigDict, model: nn.Module) -> list[Prompt]:
    """The prompts of `config.sample`, else the captions of held-out images; none where there is neither.

    Raises RearError: as `given_prompts`; the generator takes classes; or there are features of captions as well.
    """
    settings, prompts = config.sample, given_prompts(config.sample)
    option = "config.sample.prompts" if settings.prompts else "config.sample.prompt"
    if prompts and not generators.takes_captions(model):
        raise RearError(f"{option} is set, and this generator takes classes: set config.model.condition = 'text'.")
    if prompts and settings.captions:
        raise RearError(f"config.sample.captions and {option} are both set: set one of them to ''.")
    if prompts or settings.captions or not generators.takes_captions(model):
        return prompts
    return _held_out_captions(config)


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


def encode_prompts(config: ConfigDict, model: nn.Module, texts: Sequence[str]) -> Captions:
    """Features of prompts as the generator takes them: [M, length, dim] at the right end, with their mask.

    Raises RearError: there is no text encoder.
    """
    raise _no_encoder()


def check_encoder(config: ConfigDict) -> None:
    """Raises RearError where there is no text encoder."""
    raise _no_encoder()


def _no_encoder() -> RearError:
    return RearError(
        "config.text.encoder names no text encoder, which prompts need: give their features in config.sample.captions."
    )


def _captions(config: ConfigDict, model: nn.Module) -> CaptionFile | CaptionShards:
    return open_captions(
        config.sample.captions, option="config.sample.captions", length=model.caption_length, dim=model.caption_dim
    )


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Of a sample: as the tokenizer decodes it, or resized to `config.sample.image_size`."""
    size = config.sample.image_size or config.data.image_size
    return size, size, 3


def recipe_of(
    config: ConfigDict, model: nn.Module, tokenizer: Tokenizer, conditions: Any, count: int
) -> dict[str, Any]:
    """What a set of `count` images depends on beside the generator's parameters.

    Batch size and number of devices are not part of it: they change a sample by rounding alone.
    """
    labelled = {"labels": "balanced: index modulo the number of classes"}
    if generators.takes_captions(model):
        captions = fingerprint(conditions._asdict(), {})
        labelled = {"labels": "balanced: index modulo the number of captions", "captions": captions}
        if prompts := prompts_of(config, model):
            texts = fingerprint({}, {"prompts": [prompt.text for prompt in prompts]})
            order = f"prompt by prompt, {config.sample.images_per_prompt} images of each"
            labelled |= {"labels": order, "prompts": texts}
    return {
        "num_images": count,
        "image_size": image_shape(config)[0],
        **labelled,
        **dataclasses.asdict(sampler_of(config.sample)),
        "use_ema": config.sample.use_ema,
        "seed": config.seed,
        "generator_dtype": config.model.dtype,
        "tokenizer": tokenizer.fingerprint,
        "decoder": tokenizer.decoder_fingerprint,
        "tokenizer_dtype": config.tokenizer.dtype,
        "tokenizer_precision": tokenizer.module.precision,
        "eight_bit": generators.family_of(model).to_8_bit.__name__,
    }


def num_images(config: ConfigDict, model: nn.Module) -> int:
    """Images in the set: `config.sample.num_images`, or as many as its prompts ask for."""
    return len(prompts_of(config, model)) * config.sample.images_per_prompt or config.sample.num_images


def labels_of(config: ConfigDict, prompts: Sequence[Prompt], num_conditions: int) -> np.ndarray:
    """Label of each sample of the set: balanced, or with prompts the numbers of the prompts in order, each repeated."""
    if prompts:
        return np.repeat(np.arange(len(prompts), dtype=np.int32), config.sample.images_per_prompt)
    return balanced_labels(config.sample.num_images, num_conditions)


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """Label of each sample by its global index alone: every prefix of the set is as balanced as it can be."""
    return (np.arange(count) % num_classes).astype(np.int32)


def plan_batches(labels: np.ndarray, wanted: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Cuts the wanted part of the set into batches of few classes each, so that what depends on them is computed once.

    Args:
      labels: [n] of the whole set.
      wanted: indices into it.
      batch_size: B.
    """
    order = wanted[np.argsort(labels[wanted], kind="stable")]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    most_classes = max((len(np.unique(labels[some])) for some in batches), default=0)
    for some in batches:
        indices = np.pad(some, (0, batch_size - len(some)), mode="edge").astype(np.int32)
        classes, rows = np.unique(labels[indices], return_inverse=True)
        classes = np.pad(classes, (0, most_classes - len(classes)), mode="edge").astype(np.int32)
        yield Batch(indices, classes, rows.astype(np.int32), len(some))


def compile_sampler(config: ConfigDict, model: nn.Module, tokenizer: nn.Module):
    """One program: (generator params, tokenizer params, conditions, rows, indices) -> uint8 images [B, H, W, 3]."""
    cached, sampler = generators.cached(model), sampler_of(config.sample)
    to_8_bit, size = generators.family_of(model).to_8_bit, image_shape(config)[0]

    def draw(generator_params, tokenizer_params, conditions, rows, indices):
        base = jax.random.key(config.seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)
        codes = generate(cached, generator_params, conditions, rows, keys, sampler)
        images = tokenizer.apply({"params": tokenizer_params}, codes, method="decode")
        if images.shape[1] != size:
            images = bicubic(images, size)  # before they become 8-bit, as LlamaGen does
        return to_8_bit(images)

    return jax.jit(draw)


def draw_batch(program: Any, conditions: Any, batch: Batch, mesh: Mesh) -> np.ndarray:
    """Images [count, H, W, 3] of a batch, on the host; `program` is the compiled sampler with its weights filled in."""
    indices, rows = jax.device_put((batch.indices, batch.rows), split(mesh))
    distinct = jax.tree.map(lambda leaf: leaf[batch.classes], conditions)
    return fetch(program(distinct, rows, indices))[: batch.count]
