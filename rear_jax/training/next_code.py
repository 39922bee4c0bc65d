"""The objectives of `--job=train`: plain next-code prediction (AR), in random orders (RAR), and reAR."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import losses, models, noise, orders
from rear_jax.errors import RearError
from rear_jax.training.state import TrainState, accumulated_gradients, apply_gradients, learning_rate, new_state

LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def ar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it."""

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, dropout_key = jax.random.split(key)
        labels = noise.drop_labels(label_key, batch["label"], model.num_classes, config.method.label_drop)
        out = model.apply({"params": params}, batch["codes"], labels, train=True, rngs={"dropout": dropout_key})
        return _prediction(out.logits, batch["codes"])

    return loss_fn


def rar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it, in orders less and less random (arXiv 2411.00776)."""
    method = config.method

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, order_key, dropout_key = jax.random.split(key, 3)
        labels = noise.drop_labels(label_key, batch["label"], model.num_classes, method.label_drop)
        share = orders.random_share(progress, start=method.order_anneal_start, end=method.order_anneal_end)
        order = orders.draw_orders(order_key, *batch["codes"].shape, share)
        codes = orders.reorder(batch["codes"], order)
        out = model.apply({"params": params}, codes, labels, order, train=True, rngs={"dropout": dropout_key})
        loss, metrics = _prediction(out.logits, codes)
        return loss, metrics | {"random_share": share}

    return loss_fn


def rear_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy under a noisy context, plus λ times both codebook-embedding terms (arXiv 2510.04450)."""
    method = config.method

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, rate_key, noise_key, dropout_key = jax.random.split(key, 4)
        codes = batch["codes"]
        labels = noise.drop_labels(label_key, batch["label"], model.num_classes, method.label_drop)
        rates = noise.noise_rates(rate_key, method.noise_schedule, progress, len(codes), rate=method.noise_rate)
        noisy, replaced = noise.corrupt(noise_key, codes, rates, model.codebook_size)
        out = model.apply({"params": params}, noisy, labels, train=True, rngs={"dropout": dropout_key})
        loss, metrics = _prediction(out.logits, codes)
        metrics["noise"] = replaced.mean()
        if model.projector != "none":
            terms = losses.codebook_embedding_losses(
                out.shallow, out.deep, codebook[codes], replaced, reading=method.embedding_reading
            )
            loss += method.embedding_weight * (terms.shallow + terms.deep)
            metrics |= {"shallow": terms.shallow, "deep": terms.deep, "loss": loss}
        return loss, metrics

    return loss_fn


METHODS = {"ar": ar_loss, "rar": rar_loss, "rear": rear_loss}
READINGS = ("released", "paper")


def init_state(model: Any, config: ConfigDict, optimizer: optax.GradientTransformation, given: Any) -> TrainState:
    """The state before the first step.

    Args:
      model: the generator.
      config: the experiment.
      optimizer: of its parameters.
      given: parameters by name that do not start afresh.
    """
    params = model.init(jax.random.key(config.seed), *models.example_inputs(model))["params"]
    return new_state(params | given, optimizer, ema=config.train.ema_decay > 0)


def encoder(tokenizer: Any) -> Callable[[dict, jax.Array], jax.Array]:
    """(frozen with 'tokenizer', uint8 images [B, H, W, 3]) -> codes [B, N], for training from images."""

    def encode(frozen: dict, images: jax.Array) -> jax.Array:
        pixels = images.astype(jnp.float32) / 255.0
        return tokenizer.apply({"params": frozen["tokenizer"]}, pixels, method="encode")

    return encode


def train_step(model: Any, config: ConfigDict, optimizer: optax.GradientTransformation, encode: Any = None):
    """The step function of the job.

    Args:
      model: the generator.
      config: the experiment.
      optimizer: what `state.opt_state` belongs to.
      encode: (frozen, images) -> codes, when batches hold images; None when they hold codes.

    Returns:
      step(state, batch, key, frozen) -> (state, metrics), where `frozen['codebook']` is the [K, D] table.
    """
    for name, known in {"name": METHODS, "noise_schedule": noise.SCHEDULES, "embedding_reading": READINGS}.items():
        if config.method[name] not in known:
            raise RearError(f"config.method.{name} = {config.method[name]!r}: use one of {', '.join(known)}.")
    loss_fn = METHODS[config.method.name](model, config)
    steps, train = config.train.loop.steps, config.train
    schedule = learning_rate(train.optimizer, steps)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        if encode is not None:
            batch = {"codes": encode(frozen, batch["image"]), "label": batch["label"]}

        def loss_at(params, part, part_key):
            return loss_fn(params, part, part_key, progress=state.step / steps, codebook=frozen["codebook"])

        aux, gradients = accumulated_gradients(loss_at, state.params, batch, key, train.accumulation)
        metrics = jax.tree.map(jnp.mean, aux)
        metrics |= {"gradient_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return apply_gradients(state, gradients, optimizer, ema_decay=train.ema_decay), metrics

    return step


def _prediction(logits: jax.Array, codes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy and its metrics."""
    cross_entropy = jnp.mean(losses.next_code_cross_entropy(logits, codes))
    correct = jnp.mean(losses.correct_codes(logits, codes))
    return cross_entropy, {"loss": cross_entropy, "cross_entropy": cross_entropy, "correct_codes": correct}
