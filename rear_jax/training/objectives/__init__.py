"""The objectives of `--job=train`, one file each: what a generator's predictions are to be, and from what context.

To add one, write a file with an `OBJECTIVE` and name it in OBJECTIVES (docs/extending.md).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import generators, noise
from rear_jax.artifacts import TextReader, Tokenizer
from rear_jax.data.batches import code_shapes, image_shapes
from rear_jax.errors import RearError
from rear_jax.runtime.sharding import whole_frozen
from rear_jax.training import text
from rear_jax.training.loop import Learning
from rear_jax.training.objectives import ar, rar, rear
from rear_jax.training.objectives.objective import Objective
from rear_jax.training.state import TrainState, accumulated_gradients, adamw, apply_gradients, learning_rate, new_state

OBJECTIVES: dict[str, Objective] = {one.name: one for one in (ar.OBJECTIVE, rar.OBJECTIVE, rear.OBJECTIVE)}
CHOICES = {  # settings of `config.method` -> what each may be
    "noise_schedule": tuple(noise.SCHEDULES),
    "embedding_terms": tuple(rear.TERMS),
    "embedding_reading": ("released", "paper"),
}


def build_generator(config: ConfigDict, tokenizer: nn.Module) -> nn.Module:
    """The config's generator with what `config.method` needs of it.

    Raises RearError: the method is unknown, or as `generators.build`.
    """
    return generators.build(config, tokenizer, needs=_objective(config).needs(config.method))


def learning(config: ConfigDict, tokenizer: Tokenizer, given: Any, reader: TextReader | None = None) -> Learning:
    """What `--job=train` computes.

    Args:
      config: the experiment.
      tokenizer: whose codes are predicted; with shapes for its parameters the result is for a plan.
      given: parameters by name that do not start afresh.
      reader: of captions, where batches hold their tokens.
    """
    settings, model = config.train.loop, build_generator(config, tokenizer.module)
    family = generators.family_of(model)
    optimizer = adamw(config.train.optimizer, settings.steps, family.parameters)
    frozen, encode = {"codebook": tokenizer.codebook()} | text.frozen_weights(reader), None
    batch = code_shapes(settings.batch_size, tokenizer.num_codes)
    if config.codes.on_the_fly:
        frozen["tokenizer"], encode = tokenizer.params, encoder(tokenizer.module)
        batch = image_shapes(settings.batch_size, config.data.image_size)
    if generators.takes_text(model):
        rows = settings.batch_size
        batch["condition"] = reader.token_shapes(rows) if reader else family.condition_shapes(model, rows)
    return Learning(
        job="train",
        step=text.reading(train_step(model, config, optimizer, encode), reader),
        init=lambda given: init_state(model, config, optimizer, given),
        given=given,
        frozen=frozen,
        batch=batch,
        rules=(*text.RULES, whole_frozen(), *family.parameters),
        settings=settings,
        seed=config.seed,
        divides=config.mesh.divide_state,
        dtype=family.factor_dtype(model),
    )


def init_state(model: Any, config: ConfigDict, optimizer: optax.GradientTransformation, given: Any) -> TrainState:
    """The state before the first step; `given` are parameters by name that do not start afresh."""
    params = generators.family_of(model).init(model, config.seed)
    return new_state(params | given, optimizer, ema=config.train.ema_decay > 0)


def encoder(tokenizer: Any) -> Callable[[dict, jax.Array], jax.Array]:
    """(frozen with 'tokenizer', uint8 images [B, H, W, 3]) -> codes [B, N], for training from images."""

    def encode(frozen: dict, images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / 255.0
        return tokenizer.apply({"params": frozen["tokenizer"]}, pixels, method="encode")

    return encode


def train_step(model: Any, config: ConfigDict, optimizer: optax.GradientTransformation, encode: Any = None):
    """step(state, batch, key, frozen) -> (state, metrics), where `frozen['codebook']` is the [K, D] table.

    `encode`, (frozen, images) -> codes, is for batches that hold images; None where they hold codes.
    """
    for name, known in CHOICES.items():
        if config.method[name] not in known:
            raise RearError(f"config.method.{name} = {config.method[name]!r}: use one of {', '.join(known)}.")
    loss_fn = _objective(config).loss(model, config)
    steps, train = config.train.loop.steps, config.train
    schedule = learning_rate(train.optimizer, steps)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        def loss_at(params, part, _):
            if encode is not None:  # a microbatch at a time: the encoder takes memory for each image
                part = part | {"codes": encode(frozen, part["image"])}
            return loss_fn(params, part, key, progress=state.step / steps, codebook=frozen["codebook"])

        batch = batch | {"number": jnp.arange(len(batch["label"]))}
        aux, gradients = accumulated_gradients(loss_at, state.params, batch, key, train.accumulation)
        metrics = jax.tree.map(jnp.mean, aux)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return apply_gradients(state, gradients, optimizer, ema_decay=train.ema_decay), metrics

    return step


def _objective(config: ConfigDict) -> Objective:
    if config.method.name not in OBJECTIVES:
        raise RearError(f"config.method.name = {config.method.name!r}: use one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[config.method.name]
