"""The programs of the jobs as they would be compiled, with shapes in the place of every array."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data.prompts import given_prompts
from rear_jax.runtime.checkpoints import abstract
from rear_jax.runtime.mesh import check_batch, mesh_shape, replicated, split
from rear_jax.runtime.sharding import shardings
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import labels_of_classes, labels_of_prompts, scored
from rear_jax.text import t5_files
from rear_jax.text.encoder import caption_features
from rear_jax.training import loop, objectives, posttraining, vq
from rear_jax.training.posttraining.judges import judges_of
from rear_jax.training.posttraining.teacher_forcing import bare_generator

BATCH_SIZES = {  # the setting that says a program's batch
    "tokenizer": "tokenizer_training.loop.batch_size",
    "train": "train.loop.batch_size",
    "posttrain": "posttrain.loop.batch_size",
    "caption": "text.batch_size",
    "sample": "sample.batch_size",
}
NOWHERE = Path("no workdir")  # a plan reads no files of earlier jobs
MICROBATCHES = {"train": "train.accumulation", "posttrain": "posttrain.accumulation"}  # the one that cuts it in parts


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a job.

    Attributes:
      function: jitted, as the job has it.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      held: those of the arguments that matter, by what they are.
      images: that one call works on, over all chips.
      calls: of the config's whole recipe.
    """

    function: Any
    arguments: tuple[Any, ...]
    held: dict[str, Any]
    images: int
    calls: int


def tokenizer(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of `--job=tokenizer`."""
    check(config, "tokenizer", mesh.size)
    return _step(vq.learning(config, *vq.outline(config), {}), mesh)


def train(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of `--job=train`."""
    check(config, "train", mesh.size)
    tokenizer = artifacts.outline_tokenizer(config)
    reader = artifacts.outline_reader_in_step(config, NOWHERE, objectives.build_generator(config, tokenizer.module))
    return _step(objectives.learning(config, tokenizer, {}, reader), mesh)


def posttrain(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of `--job=posttrain`."""
    check(config, "posttrain", mesh.size)
    posttraining.method_of(config)
    tokenizer = artifacts.outline_tokenizer(config)
    generator = bare_generator(config, tokenizer.module)
    reader = artifacts.outline_reader_in_step(config, NOWHERE, generator)
    return _step(
        posttraining.learning(config, tokenizer, generators.shapes(generator), judges_of(config), reader), mesh
    )


def caption(config: ConfigDict, mesh: Mesh) -> Program:
    """The batch of `--job=caption`, whose texts fill all positions: whole copies of the encoder, captions divided.

    The calls of the recipe are for as many captions as an epoch has images.
    """
    check(config, "caption", mesh.size)
    generator = bare_generator(config, artifacts.outline_tokenizer(config).module)
    module, length = (
        artifacts.outline_text_encoder(config, NOWHERE, generator),
        artifacts.text_length(config, generator),
    )
    params = abstract(t5_files.shapes(module), replicated(mesh))
    shape = config.text.batch_size, length
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    tokens = abstract(tokens, split(mesh))
    return Program(
        jax.jit(functools.partial(caption_features, module)),
        (params, *tokens),
        {"parameters": params, "batch": tokens},
        config.text.batch_size,
        -(-config.plan.epoch_images // config.text.batch_size),
    )


def sample(config: ConfigDict, mesh: Mesh) -> Program:
    """The batch of `--job=sample`: prefill, cached decoding, and the tokenizer's decoder."""
    check(config, "sample", mesh.size)
    config = scored(config)
    settings, tokenizer = config.sample, artifacts.outline_tokenizer(config)
    model = objectives.build_generator(config, tokenizer.module)
    family, everywhere = generators.family_of(model), replicated(mesh)
    of_text = generators.takes_text(model) or generators.reads_tokens(model)
    if not of_text:
        labels = labels_of_classes(config)
    elif prompts := given_prompts(settings):
        labels = labels_of_prompts(settings, len(prompts))
    else:
        labels = np.arange(settings.num_images)  # of captions that are not looked for
    batch_size = draw.batch_size(config, len(labels), mesh)
    first = next(draw.plan_batches(labels, np.arange(len(labels)), batch_size))
    generator = family.shapes(model)
    weights = {
        "parameters": abstract(generator, shardings(generator, mesh, family.parameters)),
        "other networks": abstract(tokenizer.params, everywhere),
    }
    conditions = abstract(family.condition_shapes(model, len(first.classes)), everywhere)
    rows, indices = abstract((first.rows, first.indices), split(mesh))
    return Program(
        draw.compile_sampler(config, model, tokenizer.module),
        (*weights.values(), conditions, rows, indices),
        weights | {"batch": (conditions, rows, indices)},
        batch_size,
        -(-len(labels) // batch_size),
    )


PROGRAMS: dict[str, Callable[[ConfigDict, Mesh], Program]] = {
    "tokenizer": tokenizer,
    "train": train,
    "posttrain": posttrain,
    "caption": caption,
    "sample": sample,
}


def _step(learning: loop.Learning, mesh: Mesh) -> Program:
    """A training job's program as `loop.train` compiles it, in one process."""
    state, batch, frozen = learning.arguments(mesh)
    held = {
        "parameters": state.params,
        "moving average": state.ema,
        "optimiser": state.opt_state,
        "statistics": state.extra,
        "other networks": frozen,
        "batch": batch,
    }
    function, images = loop.program(learning, mesh, state), batch["label"].shape[0]
    return Program(function, (state, batch, None, frozen), held, images, calls=learning.settings.steps)


def check(config: ConfigDict, name: str, chips: int) -> None:
    """Raises RearError unless the mesh fits so many chips, and divides the batch of the program `name`."""
    batch_size, microbatches = setting(config, BATCH_SIZES[name]), microbatches_of(config, name)
    check_batch(config.mesh, batch_size, microbatches, f"config.{BATCH_SIZES[name]}", chips)


def microbatches_of(config: ConfigDict, name: str) -> int:
    """How many parts the batch of the program `name` is cut into; 1 as long as that is open."""
    return (setting(config, MICROBATCHES[name]) or 1) if name in MICROBATCHES else 1


def with_batch(config: ConfigDict, name: str, images: int) -> ConfigDict:
    """The config with another batch for the program `name`."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({BATCH_SIZES[name]: images})
    return changed


def with_divisible_batch(config: ConfigDict, name: str, chips: int) -> ConfigDict:
    """The config with the next larger batch for the program `name` that so many chips divide, if its own is none."""
    shape = mesh_shape(config.mesh, chips)
    step = microbatches_of(config, name) * shape["data"] * shape["fsdp"]
    return with_batch(config, name, -(-setting(config, BATCH_SIZES[name]) // step) * step)


def setting(config: ConfigDict, name: str) -> Any:
    """The value of a dotted setting."""
    for key in name.split("."):
        config = config[key]
    return config
