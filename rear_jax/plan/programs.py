"""The programs of the jobs as they would be compiled, with shapes in the place of every array."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import artifacts, models, sampling, tokenizers
from rear_jax.errors import RearError
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import class_probe, loop, next_code, perceptual, sharding
from rear_jax.training import mesh as placement
from rear_jax.training.checkpoints import abstract
from rear_jax.training.posttraining import METHODS, parts, rewards
from rear_jax.training.state import TrainState, adamw

BATCH_SIZES = {  # the setting that says a program's batch
    "train": "train.loop.batch_size",
    "posttrain": "posttrain.loop.batch_size",
    "sample": "sample.batch_size",
}
MICROBATCHES = {"train": "train.accumulation", "posttrain": "posttrain.accumulation"}  # the one that cuts it in parts


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a job.

    Attributes:
      function: jitted, as the job has it.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      parts: those of the arguments that matter, by what they are.
      images: that one call works on, over all chips.
      calls: of the config's whole recipe.
    """

    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    images: int
    calls: int


def train(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of `--job=train`."""
    check(config, "train", mesh.size)
    settings, tokenizer = config.train.loop, _tokenizer(config)
    model = _generator(config, tokenizer)
    if models.takes_captions(model):
        raise RearError("--job=train has no captions to go with the codes: set config.model.condition = 'class'.")
    optimizer = adamw(config.train.optimizer, settings.steps)
    rows, size = settings.batch_size, config.data.image_size
    frozen = {"codebook": _array(tokenizer.codebook_size, tokenizer.embedding_dim)}
    batch = {"codes": _array(rows, model.num_codes, dtype=jnp.int32), "label": _array(rows, dtype=jnp.int32)}
    encode = None
    if config.codes.on_the_fly:
        frozen["tokenizer"] = artifacts.tokenizer_shapes(tokenizer)
        encode = next_code.encoder(tokenizer)
        batch = _images(rows, size)
    return _step(
        next_code.train_step(model, config, optimizer, encode),
        lambda: next_code.init_state(model, config, optimizer, {}),
        frozen,
        batch,
        config.seed,
        mesh,
        calls=settings.steps,
    )


def posttrain(config: ConfigDict, mesh: Mesh) -> Program:
    """The step of `--job=posttrain`."""
    settings = config.posttrain
    check(config, "posttrain", mesh.size)
    if settings.method not in METHODS:
        raise RearError(f"config.posttrain.method = {settings.method!r}: use one of {', '.join(METHODS)}.")
    method, tokenizer = METHODS[settings.method], _tokenizer(config)
    method.check(config)
    networks, frozen = _networks(config, tokenizer)
    generator = artifacts.generator_shapes(networks.generator)
    if method.TRAINS == "decoder":
        frozen["generator"] = generator
    elif settings.kl_weight:
        frozen["reference"] = generator
    given = {"decoder": frozen["tokenizer"]["decoder"]} if method.TRAINS == "decoder" else {}
    optimizer = adamw(settings.optimizer, settings.loop.steps * settings.inner_updates)
    rows = settings.loop.batch_size
    batch = _images(rows, config.data.image_size)
    return _step(
        method.make_step(networks, config, optimizer),
        lambda: parts.init_state(networks, config, optimizer, _zeros(given), trains=method.TRAINS),
        frozen,
        batch | {"condition": _condition(networks.generator, rows)},
        config.seed,
        mesh,
        calls=settings.loop.steps,
    )


def sample(config: ConfigDict, mesh: Mesh) -> Program:
    """The batch of `--job=sample`: prefill, cached decoding, and the tokenizer's decoder."""
    settings, tokenizer = config.sample, _tokenizer(config)
    check(config, "sample", mesh.size)
    model = _generator(config, tokenizer)
    classes = settings.num_images if models.takes_captions(model) else config.data.num_classes
    labels = sampling.balanced_labels(settings.num_images, classes)
    first = next(sampling.plan_batches(labels, np.arange(len(labels)), settings.batch_size))
    generator, decoder = artifacts.generator_shapes(model), artifacts.tokenizer_shapes(tokenizer)
    everywhere = placement.replicated(mesh)
    weights = {
        "parameters": abstract(generator, sharding.shardings(generator, mesh)),
        "other networks": abstract(decoder, everywhere),
    }
    conditions = abstract(_condition(model, len(first.classes)), everywhere)
    rows, indices = abstract((first.rows, first.indices), placement.split(mesh))
    return Program(
        sampling.compile_sampler(config, model, tokenizer),
        (*weights.values(), conditions, rows, indices),
        weights | {"batch": (conditions, rows, indices)},
        settings.batch_size,
        -(-settings.num_images // settings.batch_size),
    )


PROGRAMS: dict[str, Callable[[ConfigDict, Mesh], Program]] = {"train": train, "posttrain": posttrain, "sample": sample}


def _step(
    step: loop.StepFunction,
    init: Callable[[], TrainState],
    frozen: dict,
    batch: dict,
    seed: int,
    mesh: Mesh,
    *,
    calls: int,
) -> Program:
    """A training job's program as `loop.train` compiles it, in one process."""
    shapes = jax.eval_shape(init)
    places = sharding.shardings(shapes, mesh)
    state = abstract(shapes, places)
    frozen = abstract(frozen, sharding.shardings(frozen, mesh, "frozen/"))
    batch = abstract(batch, placement.split(mesh))
    held = {
        "parameters": state.params,
        "moving average": state.ema,
        "optimiser": state.opt_state,
        "other networks": frozen,
        "batch": batch,
    }
    return Program(
        loop.step_program(step, seed, mesh, places),
        (state, batch, None, frozen),
        held,
        batch["label"].shape[0],
        calls,
    )


def check(config: ConfigDict, name: str, chips: int) -> None:
    """Raises RearError unless the mesh fits so many chips, and divides the batch of the program `name`."""
    batch_size, microbatches = setting(config, BATCH_SIZES[name]), microbatches_of(config, name)
    placement.check_batch(config.mesh, batch_size, microbatches, f"config.{BATCH_SIZES[name]}", chips)


def microbatches_of(config: ConfigDict, name: str) -> int:
    """How many parts the batch of the program `name` is cut into."""
    return setting(config, MICROBATCHES[name]) if name in MICROBATCHES else 1


def with_batch(config: ConfigDict, name: str, images: int) -> ConfigDict:
    """The config with another batch for the program `name`."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({BATCH_SIZES[name]: images})
    return changed


def with_divisible_batch(config: ConfigDict, name: str, chips: int) -> ConfigDict:
    """The config with the next larger batch for the program `name` that so many chips divide, if its own is none."""
    shape = placement.mesh_shape(config.mesh, chips)
    step = microbatches_of(config, name) * shape["data"] * shape["fsdp"]
    return with_batch(config, name, -(-setting(config, BATCH_SIZES[name]) // step) * step)


def setting(config: ConfigDict, name: str) -> Any:
    """The value of a dotted setting."""
    for key in name.split("."):
        config = config[key]
    return config


def _tokenizer(config: ConfigDict) -> Any:
    return tokenizers.build(config.tokenizer, config.data.image_size)


def _generator(config: ConfigDict, tokenizer: Any) -> models.Generator:
    return models.build(config, num_codes=tokenizer.codes_per_image, embedding_dim=tokenizer.embedding_dim)


def _networks(config: ConfigDict, tokenizer: Any) -> tuple[parts.Networks, dict[str, Any]]:
    """Everything that plays a part in post-training, and the shapes of what is frozen of it, as the job loads them."""
    settings, wanted = config.posttrain, rewards.wanted(config.posttrain)
    frozen = {"tokenizer": artifacts.tokenizer_shapes(tokenizer)}
    networks = parts.Networks(parts.bare_generator(config, tokenizer), tokenizer)
    if "perceptual" in wanted:
        network = perceptual.outline(settings.perceptual_network, option="config.posttrain.perceptual_network")
        networks, frozen["perceptual"] = networks._replace(perceptual=network), network.params
    if "discriminator" in wanted:
        vq = config.tokenizer_training
        network = PatchDiscriminator(vq.discriminator_channels, vq.discriminator_layers)
        networks = networks._replace(discriminator=network)
        frozen["discriminator"] = artifacts.discriminator_shapes(network, config.data.image_size)
    if "class_probability" in wanted:
        probe = class_probe.outline(config.data.num_classes, feature_size=config.evaluate.feature_size)
        networks, frozen["class_probe"] = networks._replace(class_probe=probe), probe.params
    return networks, frozen


def _condition(model: models.Generator, rows: int) -> Any:
    """Shapes of what `rows` sequences are conditioned on."""
    return jax.tree.map(lambda x: _array(rows, *x.shape[1:], dtype=x.dtype), models.example_inputs(model)[1])


def _images(rows: int, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `data.batches.image_batches`."""
    numbers = _array(rows, dtype=jnp.int32)
    return {"image": _array(rows, size, size, 3, dtype=jnp.uint8), "label": numbers, "index": numbers}


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
