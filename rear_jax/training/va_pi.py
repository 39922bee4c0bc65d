"""VA-π: a generator is rewarded for teacher-forced samples that decode back to the image (arXiv 2512.19680).

One forward pass serves an image: its logits are what samples are drawn from, what their log-probabilities are gathered
from, and what the prior's cross-entropy is of. Dropout and label dropping are off, so that ρ is 1 at the first update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import grpo, losses, noise
from rear_jax.errors import RearError
from rear_jax.training import rewards
from rear_jax.training.mesh import map_rows
from rear_jax.training.perceptual import PerceptualNetwork
from rear_jax.training.state import TrainState, accumulated_gradients, apply_gradients, learning_rate, merged_parts

READINGS = {"paper": True, "released": False}  # noise: is a replaced code always a different one?


class Networks(NamedTuple):
    """The modules that play a part; all but the generator are frozen. No perceptual network where its weight is 0."""

    generator: Any
    tokenizer: Any
    perceptual: PerceptualNetwork | None


class Rollout(NamedTuple):
    """What the policy drew, and what it was worth.

    Attributes:
      codes: [B, N] of the image.
      context: [B, N] the codes that the generator reads.
      labels: [B].
      samples: [B, G, N].
      old: [B, G, N] log-probabilities of the samples when they were drawn.
      advantages: [B, G].
    """

    codes: jax.Array
    context: jax.Array
    labels: jax.Array
    samples: jax.Array
    old: jax.Array
    advantages: jax.Array


def check_settings(settings: ConfigDict) -> None:
    """Raises RearError where `config.posttrain` cannot work."""
    if settings.noise_reading not in READINGS:
        raise RearError(f"config.posttrain.noise_reading = {settings.noise_reading!r}: use {', '.join(READINGS)}.")
    if settings.group < 2:
        raise RearError(f"config.posttrain.group = {settings.group}: a standard deviation needs at least 2 samples.")
    if settings.inner_updates < 1:
        raise RearError(f"config.posttrain.inner_updates = {settings.inner_updates}: give at least 1.")
    if not any(settings[f"{name}_weight"] for name in rewards.PARTS):
        raise RearError(f"config.posttrain has no reward: give {', '.join(rewards.PARTS)}_weight one that is not 0.")


def posttrain_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """The step function of the job.

    Returns:
      step(state, batch of uint8 'image' and 'label', key, frozen with 'tokenizer', 'perceptual' and, for the KL term,
      'reference') -> (state, metrics).
    """
    settings = config.posttrain
    check_settings(settings)
    schedule = learning_rate(settings.optimizer, settings.loop.steps * settings.inner_updates)

    def first_loss(frozen):
        """The loss that draws its own samples: rollout and update in one forward pass."""

        def loss_fn(params, batch, key):
            noise_key, sample_key = jax.random.split(key)
            images = batch["image"].astype(jnp.float32) / 255.0
            codes = networks.tokenizer.apply({"params": frozen["tokenizer"]}, images, method="encode")
            context, _ = noise.corrupt(
                noise_key,
                codes,
                jnp.full(len(codes), settings.noise_rate),
                networks.tokenizer.codebook_size,
                different=READINGS[settings.noise_reading],
            )
            logits = predict(params, context, batch["label"])
            samples = grpo.draw_groups(sample_key, jax.lax.stop_gradient(logits), settings.group)
            reward, parts = score(networks, settings, frozen, samples, images)
            advantages = grpo.group_advantages(reward, max_advantage=settings.max_advantage)
            old = jax.lax.stop_gradient(grpo.gather_log_probabilities(logits, samples))
            drawn = Rollout(codes, context, batch["label"], samples, old, advantages)
            loss, metrics = objective(logits, drawn, frozen)
            metrics |= {
                "reward": jnp.mean(reward),
                "reward_spread": jnp.mean(jnp.std(reward, axis=-1, ddof=1)),
                "advantage_spread": jnp.std(advantages),
                "entropy": grpo.entropy(logits),
                **{f"reward_{name}": jnp.mean(part) for name, part in parts.items()},
            }
            return loss, (metrics, drawn)

        return loss_fn

    def predict(params, context, labels):
        return networks.generator.apply({"params": params}, context, labels).logits

    def objective(logits, drawn: Rollout, frozen):
        """Loss and its terms for logits of the policy as it is now."""
        new = grpo.gather_log_probabilities(logits, drawn.samples)
        policy = grpo.policy_terms(new, drawn.old, drawn.advantages, clip_range=settings.clip_range)
        prior = jnp.mean(losses.next_code_cross_entropy(logits, drawn.codes))
        loss = policy.loss + settings.prior_weight * prior
        metrics = {"policy": policy.loss, "ratio": policy.ratio, "clip_share": policy.clip_share, "prior": prior}
        if settings.kl_weight:
            reference = predict(frozen["reference"], drawn.context, drawn.labels)
            kl = grpo.kl_to_reference(new, grpo.gather_log_probabilities(reference, drawn.samples))
            loss += settings.kl_weight * kl
            metrics["kl"] = kl
        return loss, metrics | {"loss": loss}

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        start = state.step
        (parts, drawn), gradients = accumulated_gradients(
            first_loss(frozen), state.params, batch, key, settings.accumulation
        )
        metrics = jax.tree.map(jnp.mean, parts) | {"gradient_norm": optax.tree.norm(gradients)}
        drawn = merged_parts(drawn)
        state = apply_gradients(state, gradients, optimizer)
        for _ in range(settings.inner_updates - 1):

            def again(params, drawn, key):
                return objective(predict(params, drawn.context, drawn.labels), drawn, frozen)

            last, gradients = accumulated_gradients(again, state.params, drawn, key, settings.accumulation)
            metrics |= {name: jnp.mean(last[name]) for name in ("ratio", "clip_share")}
            state = apply_gradients(state, gradients, optimizer)
        return state.replace(step=start + 1), metrics | {"learning_rate": schedule(start * settings.inner_updates)}

    return step


def score(networks: Networks, settings: ConfigDict, frozen: dict, samples: jax.Array, images: jax.Array) -> tuple:
    """Rewards [B, G] of samples [B, G, N] for images [B, H, W, 3] in [0, 1], and their parts by name.

    A few images of a device at a time, so that no more than these are held decoded.
    """

    def of_one_image(inputs):
        codes, image = inputs
        decoded = networks.tokenizer.apply({"params": frozen["tokenizer"]}, codes, method="decode")
        decoded = jnp.clip(decoded, 0.0, 1.0)
        return rewards.reconstruction_rewards(settings, networks.perceptual, frozen["perceptual"], decoded, image[None])

    return map_rows(of_one_image, (samples, images), at_once=settings.images_at_once)
