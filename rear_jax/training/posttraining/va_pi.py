"""VA-π: a generator is rewarded for teacher-forced samples that decode back to the image (arXiv 2512.19680).

One forward pass serves an image: its logits are what samples are drawn from, what their log-probabilities are gathered
from, and what the prior's cross-entropy is of. Dropout is off, and conditions are dropped in a part of the prior
alone, so that ρ is 1 at the first update.
"""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from rear_jax import grpo
from rear_jax.training.posttraining import policy
from rear_jax.training.posttraining.method import Method
from rear_jax.training.posttraining.teacher_forcing import Networks, draw_samples, predict, prior, read_context


def make_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch, key, frozen with 'tokenizer', what rewards need, and 'reference' for a KL term)."""
    settings = config.posttrain

    def first_loss(params: Any, batch: dict, key: jax.Array, frozen: dict):
        noise_key, sample_key, drop_key = jax.random.split(key, 3)
        context = read_context(networks, settings, frozen, batch, noise_key)
        logits = predict(networks, params, context)
        samples = grpo.draw_groups(sample_key, jax.lax.stop_gradient(logits), settings.group)
        advantages, watched = policy.judge(networks, settings, frozen, samples, batch)
        old = jax.lax.stop_gradient(grpo.gather_log_probabilities(logits, samples))
        rollout = policy.Rollout(context, samples, old, advantages)
        loss, metrics = objective(params, logits, rollout, drop_key, frozen)
        return loss, (metrics | watched | {"entropy": grpo.entropy(logits)}, rollout)

    def later_loss(params: Any, rollout: policy.Rollout, key: jax.Array, frozen: dict):
        _, _, drop_key = jax.random.split(key, 3)
        return objective(params, predict(networks, params, rollout.context), rollout, drop_key, frozen)

    def objective(params: Any, logits: jax.Array, rollout: policy.Rollout, key: jax.Array, frozen: dict):
        """Clipped objective + β · cross-entropy of the image's own codes, for logits of the policy as it is now."""

        def reference():
            logits = predict(networks, frozen["reference"], rollout.context)
            return grpo.gather_log_probabilities(logits, rollout.samples)

        new = grpo.gather_log_probabilities(logits, rollout.samples)
        loss, metrics = policy.clipped_loss(settings, new, rollout, reference)
        own_codes, terms = prior(networks, settings, params, logits, rollout.context, key)
        loss += settings.prior_weight * own_codes
        return loss, metrics | terms | {"loss": loss}

    return policy.make_step(config, optimizer, first_loss, later_loss)


METHOD = Method(
    trains="generator",
    make_step=make_step,
    draw_samples=draw_samples,
    reads=("noise_rate", "label_drop", *policy.SETTINGS),
    check=policy.check,
)
