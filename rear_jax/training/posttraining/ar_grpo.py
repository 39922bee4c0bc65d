"""AR-GRPO: the generator is rewarded for images that it draws on its own (arXiv 2508.06924).

Rollouts are free-running and guided, by the KV-cached generator, as `config.sample` says. The policy is the
distribution that drew them: log-probabilities, old, new and the reference's, are those of guided logits at the same
temperature, so that ρ is 1 at the first update. Images only lend their labels or captions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import generators, grpo, guidance
from rear_jax.errors import RearError
from rear_jax.sampling.generate import generate, sampler_of
from rear_jax.training.posttraining import policy, rewards
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.teacher_forcing import Context, Networks, predict


class Prompts(NamedTuple):
    """What sequences are drawn for: a condition for each of B groups."""

    condition: Any


def check(config: ConfigDict) -> None:
    """Raises RearError where `config.posttrain` and `config.sample` cannot work together."""
    policy.check(config)
    if config.posttrain.prior_weight:
        raise RearError("config.posttrain.prior_weight: 'ar_grpo' has no codes to predict: set it to 0, use kl_weight.")
    if config.sample.top_k or config.sample.top_p < 1.0 or config.sample.temperature <= 0.0:
        raise RearError(
            "config.sample.top_k, top_p or temperature: 'ar_grpo' draws from the whole distribution that it learns: "
            "set them to 0, 1 and more than 0."
        )


def make_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch, key, frozen with 'tokenizer', what rewards need, and 'reference' for a KL term)."""
    settings = config.posttrain

    def first_loss(params: Any, batch: dict, key: jax.Array, frozen: dict):
        samples = draw_samples(networks, config, jax.lax.stop_gradient(params), frozen, batch, key)
        advantages, watched = policy.judge(networks, settings, frozen, samples, batch)
        new = log_probabilities(networks, config, params, batch["condition"], samples)
        rollout = policy.Rollout(Prompts(batch["condition"]), samples, jax.lax.stop_gradient(new), advantages)
        loss, metrics = objective(new, rollout, frozen)
        entropy = -jnp.mean(new)  # estimated from what was drawn
        return loss, (metrics | watched | {"entropy": entropy}, rollout)

    def later_loss(params: Any, rollout: policy.Rollout, key: jax.Array, frozen: dict):
        new = log_probabilities(networks, config, params, rollout.context.condition, rollout.samples)
        return objective(new, rollout, frozen)

    def objective(new: jax.Array, rollout: policy.Rollout, frozen: dict):
        def reference():
            condition = rollout.context.condition
            return log_probabilities(networks, config, frozen["reference"], condition, rollout.samples)

        loss, metrics = policy.clipped_loss(settings, new, rollout, reference)
        return loss, metrics | {"loss": loss}

    return policy.make_step(config, optimizer, first_loss, later_loss)


def draw_samples(
    networks: Networks, config: ConfigDict, params: Any, frozen: dict, batch: dict, key: jax.Array
) -> jax.Array:
    """G free-running code sequences [B, G, N] for each condition of the batch."""
    batch_size, group = len(batch["label"]), config.posttrain.group
    rows = jnp.repeat(jnp.arange(batch_size), group)
    keys = jax.random.split(key, batch_size * group)
    cached = generators.cached(networks.generator)
    codes = generate(cached, params, batch["condition"], rows, keys, sampler_of(config.sample))
    return codes.reshape(batch_size, group, -1)


def log_probabilities(
    networks: Networks, config: ConfigDict, params: Any, condition: Any, samples: jax.Array
) -> jax.Array:
    """Log-probabilities [B, G, N] of samples [B, G, N] under the guided generator, each reading its own codes."""
    batch_size, group, length = samples.shape
    codes = samples.reshape(-1, length)
    cached, sample = generators.cached(networks.generator), config.sample
    rows = jnp.repeat(jnp.arange(batch_size), group)
    guided = cached.guides(sample.guidance_scale)
    if guided:
        condition, rows = cached.with_unconditional(cached.prepare(params), condition, rows)
        codes = jnp.concatenate([codes, codes])
    context = Context(codes, codes, jax.tree.map(lambda leaf: leaf[rows], condition))
    logits = predict(networks, params, context)  # [B G, N, K], twice as many when guided
    if guided:
        weights = guidance.guidance_weight(
            sample.guidance,
            sample.guidance_scale,
            jnp.arange(length),
            length,
            power=sample.guidance_power,
            interval=sample.guidance_interval,
        )
        logits = guidance.guide(*jnp.split(logits, 2), weights[:, None])
    gathered = grpo.gather_log_probabilities(logits / sample.temperature, samples.reshape(-1, 1, length))
    return gathered.reshape(samples.shape)


METHOD = Method(
    trains="generator",
    make_step=make_step,
    draw_samples=draw_samples,
    reads=policy.SETTINGS,
    lacks={rewards.ORIGINAL: "compares with an original, which free-running rollouts do not have"},
    check=check,
)
