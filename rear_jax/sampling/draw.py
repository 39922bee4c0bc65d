"""Drawing images of given labels: which go together in a batch, and the one program that draws a batch."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts import Generator, Tokenizer
from rear_jax.runtime import sharding
from rear_jax.runtime.mesh import fetch, replicated, split
from rear_jax.sampling.conditions import Conditions
from rear_jax.sampling.generate import Sampler, generate, sampler_of
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


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Of a sample: as the tokenizer decodes it, or resized to `config.sample.image_size`."""
    size = config.sample.image_size or config.data.image_size
    return size, size, 3


def recipe_of(
    config: ConfigDict, model: nn.Module, tokenizer: Tokenizer, conditions: Conditions, count: int
) -> dict[str, Any]:
    """What a set of `count` images depends on beside the generator's parameters.

    Batch size and number of devices are not part of it: they change a sample by rounding alone.
    """
    return {
        "num_images": count,
        "image_size": image_shape(config)[0],
        **conditions.recipe,
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


def batch_size(config: ConfigDict, count: int, mesh: Mesh) -> int:
    """B of a set of `count` images: `config.sample.batch_size`, or fewer where the set is smaller than that."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return min(config.sample.batch_size, -(-count // devices) * devices)


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
    with_key = sampler_program(model, tokenizer, sampler_of(config.sample), image_shape(config)[0])

    def draw(generator_params, tokenizer_params, conditions, rows, indices):
        return with_key(jax.random.key(config.seed), generator_params, tokenizer_params, conditions, rows, indices)

    return jax.jit(draw)


def sampler_program(model: nn.Module, tokenizer: nn.Module, sampler: Sampler, size: int):
    """The same with a random key, that of the whole set, as its first argument; images have `size` pixels a side."""
    cached, to_8_bit = generators.cached(model), generators.family_of(model).to_8_bit

    def draw(key, generator_params, tokenizer_params, conditions, rows, indices):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        codes = generate(cached, generator_params, conditions, rows, keys, sampler)
        images = tokenizer.apply({"params": tokenizer_params}, codes, method="decode")
        return to_8_bit(resized(images, size))

    return jax.jit(draw)


def resized(images: Float[Array, "B H W 3"], size: int) -> Float[Array, "B S S 3"]:
    """Images of `size` pixels a side, inside a program, before they become 8-bit: so does LlamaGen."""
    return images if images.shape[1] == size else bicubic(images, size)


def place(generator: Generator, tokenizer: Tokenizer, mesh: Mesh) -> tuple[Any, Any]:
    """Parameters of both on the devices: the generator's divided as in training, the tokenizer's whole."""
    rules = generators.family_of(generator.module).parameters
    return (
        jax.device_put(generator.params, sharding.shardings(generator.params, mesh, rules)),
        jax.device_put(tokenizer.params, replicated(mesh)),
    )


def draw_batch(program: Any, conditions: Conditions, batch: Batch, mesh: Mesh) -> np.ndarray:
    """Images [count, H, W, 3] of a batch, on the host; `program` is the compiled sampler with its weights filled in."""
    indices, rows = jax.device_put((batch.indices, batch.rows), split(mesh))
    return fetch(program(conditions.look_up(batch.classes), rows, indices))[: batch.count]
