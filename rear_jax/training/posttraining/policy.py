"""Policy gradients over groups of samples: what VA-π and AR-GRPO share, from rewards to the optimiser's steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import grpo
from rear_jax.errors import RearError
from rear_jax.training.posttraining.method import means
from rear_jax.training.posttraining.rewards import score, watched
from rear_jax.training.posttraining.teacher_forcing import Networks
from rear_jax.training.state import (
    TrainState,
    accumulated_gradients,
    apply_gradients,
    learning_rate,
    merged_microbatches,
)

SETTINGS = ("max_advantage", "clip_range", "policy_weight", "kl_weight", "inner_updates")  # read by these methods alone


class Rollout(NamedTuple):
    """What the policy drew, and what it was worth.

    Attributes:
      context: what the samples' probabilities are conditioned on, arrays that lead with B.
      samples: [B, G, N].
      old: [B, G, N] log-probabilities of the samples when they were drawn.
      advantages: [B, G].
    """

    context: Any
    samples: jax.Array
    old: jax.Array
    advantages: jax.Array


def check(config: ConfigDict) -> None:
    """Raises RearError where the settings of a policy gradient cannot work."""
    settings = config.posttrain
    if settings.group < 2:
        raise RearError(f"config.posttrain.group = {settings.group}: a standard deviation needs at least 2 samples.")


def judge(
    networks: Networks, settings: ConfigDict, frozen: dict, samples: jax.Array, batch: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Advantages [B, G] of samples [B, G, N], and what to watch of their rewards."""
    reward, each = score(networks, settings, frozen, samples, batch)
    advantages = grpo.group_advantages(reward, max_advantage=settings.max_advantage)
    return advantages, watched(reward, each, batch) | {
        "reward_std": jnp.std(reward),
        "reward_spread": jnp.mean(jnp.std(reward, axis=-1, ddof=1)),
        "advantage_spread": jnp.std(advantages),
    }


def clipped_loss(
    settings: ConfigDict, new: jax.Array, rollout: Rollout, reference: Callable[[], jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped objective and, where its weight is not 0, the divergence from the reference.

    Args:
      settings: `config.posttrain`.
      new: [B, G, N] log-probabilities of the samples under the policy as it is now.
      rollout: the samples.
      reference: makes those under the generator that training started from; called only if needed.

    Returns:
      The loss and its terms by name.
    """
    policy = grpo.policy_terms(new, rollout.old, rollout.advantages, clip_range=settings.clip_range)
    metrics = {"policy": policy.loss, "ratio": policy.ratio, "clip_share": policy.clip_share}
    loss = settings.policy_weight * policy.loss
    if not settings.kl_weight:
        return loss, metrics
    kl = grpo.kl_to_reference(new, reference())
    return loss + settings.kl_weight * kl, metrics | {"kl": kl}


def make_step(config: ConfigDict, optimizer: optax.GradientTransformation, first_loss, later_loss):
    """The step function of a policy gradient with `inner_updates` optimiser steps for each rollout.

    Args:
      config: the experiment.
      optimizer: of the generator's parameters.
      first_loss: (params, batch, key, frozen) -> (loss, (metrics, rollout)): draws its own samples, so that rollout
        and first update may share a forward pass.
      later_loss: (params, rollout, key, frozen) -> (loss, metrics), for the updates after it, with the same key.

    Returns:
      step(state, batch, key, frozen) -> (state, metrics). These are of the first update; of the last one, if there are
      several, are 'ratio', 'clip_share', 'last_gradient_norm' and, where there is a KL term, 'last_kl'.
    """
    settings = config.posttrain
    schedule = learning_rate(settings.optimizer, settings.loop.steps * settings.inner_updates)

    def step(state: TrainState, batch: dict, key: jax.Array, frozen: dict) -> tuple[TrainState, dict]:
        def first(params, batch, key):
            return first_loss(params, batch, key, frozen)

        def later(params, rollout, key):
            return later_loss(params, rollout, key, frozen)

        start = state.step
        (stacked, rollout), gradients = accumulated_gradients(first, state.params, batch, key, settings.accumulation)
        metrics = means(stacked) | {"gradient_norm": optax.tree.norm(gradients)}
        rollout = merged_microbatches(rollout)
        state = apply_gradients(state, gradients, optimizer)
        for _ in range(settings.inner_updates - 1):
            stacked, gradients = accumulated_gradients(later, state.params, rollout, key, settings.accumulation)
            last = means(stacked) | {"gradient_norm": optax.tree.norm(gradients)}
            metrics |= {name: last[name] for name in ("ratio", "clip_share")}
            metrics |= {f"last_{name}": last[name] for name in ("kl", "gradient_norm") if name in last}
            state = apply_gradients(state, gradients, optimizer)
        return state.replace(step=start + 1), metrics | {"learning_rate": schedule(start * settings.inner_updates)}

    return step
