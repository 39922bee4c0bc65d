"""What the methods of post-training share: networks, the teacher-forced forward pass, and the judging of samples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import grpo, models, noise
from rear_jax.config import default
from rear_jax.errors import RearError
from rear_jax.training.class_probe import ClassProbe
from rear_jax.training.loop import SUSPECT
from rear_jax.training.mesh import map_rows
from rear_jax.training.perceptual import PerceptualNetwork
from rear_jax.training.posttraining import rewards
from rear_jax.training.state import TrainState, accumulated_gradients, apply_gradients, learning_rate, new_state

READINGS = {"paper": True, "released": False}  # noise: is a replaced code always a different one?


class Networks(NamedTuple):
    """The modules that play a part. Those that only a reward asks for are None where its weight is 0.

    `frozen` has the parameters of those that do not learn under the same names, and under 'reference' those of the
    generator that training started from, where a KL term compares with it.
    """

    generator: Any
    tokenizer: Any
    perceptual: PerceptualNetwork | None = None
    discriminator: Any = None
    class_probe: ClassProbe | None = None


class Context(NamedTuple):
    """What a teacher-forced pass reads of each image: its codes [B, N], the same with noise [B, N], its condition."""

    codes: jax.Array
    noisy: jax.Array
    condition: Any


def check(settings: ConfigDict, *, unread: tuple[str, ...] = ()) -> None:
    """Raises RearError where what all methods read of `config.posttrain` cannot work, or where `unread` was set.

    Args:
      settings: `config.posttrain`.
      unread: settings that the method does not read, and that must have their defaults.
    """
    untouched = default().posttrain
    for name in unread:
        if settings[name] != untouched[name]:
            raise RearError(
                f"config.posttrain.{name} = {settings[name]} has no effect with config.posttrain.method = "
                f"{settings.method!r}: leave it at {untouched[name]}."
            )
    if settings.noise_reading not in READINGS:
        raise RearError(f"config.posttrain.noise_reading = {settings.noise_reading!r}: use {', '.join(READINGS)}.")
    if not 0.0 <= settings.noise_rate <= 1.0:
        raise RearError(f"config.posttrain.noise_rate = {settings.noise_rate}: a probability lies in 0..1.")
    unknown = sorted(set(settings.reward) - set(rewards.REWARDS))
    if unknown:
        raise RearError(f"config.posttrain.reward.{unknown[0]} is no reward: use {', '.join(rewards.REWARDS)}.")
    if not rewards.wanted(settings):
        raise RearError(f"config.posttrain.reward is all 0: give one of {', '.join(settings.reward)} a weight.")


def bare_generator(config: ConfigDict, tokenizer: Any) -> Any:
    """The config's generator without what only its training needs: projectors and dropout play no part here."""
    bare = config.copy_and_resolve_references()
    bare.method.name = "ar"
    return models.build(bare, num_codes=tokenizer.codes_per_image, embedding_dim=tokenizer.embedding_dim)


def init_state(
    networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation, given: Any, *, trains: str
) -> TrainState:
    """The state before the first step.

    Args:
      networks: see there.
      config: the experiment.
      optimizer: of what is trained.
      given: its parameters, as far as they do not start afresh.
      trains: the method's TRAINS.
    """
    if trains == "decoder":
        return new_state(given, optimizer)
    params = networks.generator.init(jax.random.key(config.seed), *models.example_inputs(networks.generator))["params"]
    return new_state(params | given, optimizer)


def unit_images(batch: dict) -> jax.Array:
    """The batch's images as floats in [0, 1]."""
    return batch["image"].astype(jnp.float32) / 255.0


def read_context(networks: Networks, settings: ConfigDict, frozen: dict, batch: dict, key: jax.Array) -> Context:
    """Codes of a batch's images; each is replaced with probability ξ in what the generator reads."""
    tokenizer = networks.tokenizer
    codes = tokenizer.apply({"params": frozen["tokenizer"]}, unit_images(batch), method="encode")
    rates = jnp.full(len(codes), settings.noise_rate)
    noisy, _ = noise.corrupt(key, codes, rates, tokenizer.codebook_size, different=READINGS[settings.noise_reading])
    return Context(codes, noisy, batch["condition"])


def predict(networks: Networks, params: Any, context: Context) -> jax.Array:
    """Teacher-forced logits [B, N, K]; no dropout and no dropped conditions."""
    return networks.generator.apply({"params": params}, context.noisy, context.condition).logits


def teacher_forced_samples(
    networks: Networks, config: ConfigDict, params: Any, frozen: dict, batch: dict, key: jax.Array
) -> jax.Array:
    """G code sequences [B, G, N] for each image, every code drawn given the image's own codes before it."""
    noise_key, sample_key = jax.random.split(key)
    context = read_context(networks, config.posttrain, frozen, batch, noise_key)
    return grpo.draw_groups(sample_key, predict(networks, params, context), config.posttrain.group)


def decode(networks: Networks, params: Any, codes: jax.Array) -> jax.Array:
    """Images [B, H, W, 3] in [0, 1] of codes [B, N]."""
    return jnp.clip(networks.tokenizer.apply({"params": params}, codes, method="decode"), 0.0, 1.0)


def score(
    networks: Networks, settings: ConfigDict, frozen: dict, samples: jax.Array, batch: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards [B, G] of samples [B, G, N] for a batch, and their parts [B, G] by name.

    A few images of a device at a time, so that no more than these are held decoded.
    """

    def of_one_image(inputs):
        codes, image, label = inputs
        images = decode(networks, frozen["tokenizer"], codes)
        seen = rewards.Seen(networks, frozen, codes, image[None])
        return rewards.total(settings, images, jnp.full(len(codes), label), seen)

    inputs = samples, unit_images(batch), batch["label"]
    return map_rows(of_one_image, inputs, at_once=settings.images_at_once)


def first_not_finite(reward: jax.Array, batch: dict) -> jax.Array:
    """Place in the data set of the first image with a reward [B, G] that is not finite, or -1."""
    broken = ~jnp.all(jnp.isfinite(reward), axis=-1)
    return jnp.where(jnp.any(broken), batch["index"][jnp.argmax(broken)], -1)


def descent_step(config: ConfigDict, optimizer: optax.GradientTransformation, loss_fn):
    """The step function that descends a loss (params, batch, key, frozen) -> (loss, metrics) once.

    Returns:
      step(state, batch, key, frozen) -> (state, metrics).
    """
    settings = config.posttrain
    schedule = learning_rate(settings.optimizer, settings.loop.steps)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        def loss(params, batch, key):
            return loss_fn(params, batch, key, frozen)

        stacked, gradients = accumulated_gradients(loss, state.params, batch, key, settings.accumulation)
        metrics = means(stacked) | {"gradient_norm": optax.tree.norm(gradients)}
        return apply_gradients(state, gradients, optimizer), metrics | {"learning_rate": schedule(state.step)}

    return step


def means(stacked: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Metrics of a step from those of its microbatches."""
    return {name: jnp.max(values) if name == SUSPECT else jnp.mean(values) for name, values in stacked.items()}
