"""VA-π: a generator is rewarded for teacher-forced samples that decode back to the image (arXiv 2512.19680).

One forward pass serves an image: its logits are what samples are drawn from, what their log-probabilities are gathered
from, and what the prior's cross-entropy is of. Dropout and label dropping are off, so that ρ is 1 at the first update.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import grpo, losses
from rear_jax.training.posttraining import policy
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.teacher_forcing import Networks, draw_samples, predict, read_context


def make_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch, key, frozen with 'tokenizer', what rewards need, and 'reference' for a KL term)."""
    settings = config.posttrain

    def first_loss(params: Any, batch: dict, key: jax.Array, frozen: dict):
        noise_key, sample_key = jax.random.split(key)
        context = read_context(networks, settings, frozen, batch, noise_key)
        logits = predict(networks, params, context)
        samples = grpo.draw_groups(sample_key, jax.lax.stop_gradient(logits), settings.group)
        advantages, watched = policy.judge(networks, settings, frozen, samples, batch)
        old = jax.lax.stop_gradient(grpo.gather_log_probabilities(logits, samples))
        rollout = policy.Rollout(context, samples, old, advantages)
        loss, metrics = objective(logits, rollout, frozen)
        return loss, (metrics | watched | {"entropy": grpo.entropy(logits)}, rollout)

    def later_loss(params: Any, rollout: policy.Rollout, frozen: dict):
        return objective(predict(networks, params, rollout.context), rollout, frozen)

    def objective(logits: jax.Array, rollout: policy.Rollout, frozen: dict):
        """Clipped objective + β · cross-entropy of the image's own codes, for logits of the policy as it is now."""

        def reference():
            logits = predict(networks, frozen["reference"], rollout.context)
            return grpo.gather_log_probabilities(logits, rollout.samples)

        new = grpo.gather_log_probabilities(logits, rollout.samples)
        loss, metrics = policy.clipped_loss(settings, new, rollout, reference)
        prior = jnp.mean(losses.next_code_cross_entropy(logits, rollout.context.codes))
        loss += settings.prior_weight * prior
        return loss, metrics | {"prior": prior, "loss": loss}

    return policy.make_step(config, optimizer, first_loss, later_loss)


METHOD = Method(
    trains="generator",
    make_step=make_step,
    draw_samples=draw_samples,
    reads=("noise_rate", *policy.SETTINGS),
    check=policy.check,
)
