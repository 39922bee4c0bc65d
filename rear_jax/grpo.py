"""Group-relative policy optimisation of a teacher-forced generator (VA-π, arXiv 2512.19680; GRPO, arXiv 2402.03300).

All G samples of an image share one context, so one [B, N, K] array of logits serves all of them: log-probabilities are
computed once and gathered G times, forward and backward. Nothing here but jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

EPSILON = 1e-8  # added to the group's standard deviation


class PolicyTerms(NamedTuple):
    """The clipped objective and what to watch of it, each a scalar.

    Attributes:
      loss: -mean over sequences and positions of min(ρA, clip(ρ, 1 ± ε)A).
      ratio: mean of ρ = π_new / π_old; exactly 1 at the first update of a rollout.
      clip_share: share of positions with ρ outside 1 ± ε.
    """

    loss: Float[Array, ""]
    ratio: Float[Array, ""]
    clip_share: Float[Array, ""]


def draw_groups(key: PRNGKeyArray, logits: Float[Array, "B N K"], group: int) -> Int[Array, "B G N"]:
    """G independent code sequences per context, each position from its own teacher-forced distribution."""
    batch, length, _ = logits.shape
    drawn = jax.random.categorical(key, _at_least_float32(logits)[:, None], axis=-1, shape=(batch, group, length))
    return drawn.astype(jnp.int32)


def gather_log_probabilities(logits: Float[Array, "B N K"], samples: Int[Array, "B G N"]) -> Float[Array, "B G N"]:
    """Log-probability of each sampled code under the one set of logits of its image, in float32 or better."""
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
    gathered = jnp.take_along_axis(log_probabilities, samples.swapaxes(1, 2), axis=-1)  # [B, N, G]
    return gathered.swapaxes(1, 2)


def group_advantages(rewards: Float[Array, "B G"], *, max_advantage: float = 5.0) -> Float[Array, "B G"]:
    """(R - group mean) / (group standard deviation + 1e-8), clipped to ± `max_advantage`.

    The standard deviation divides by G - 1. Equal rewards give advantages of exactly zero.

    Raises:
      ValueError: a group of one has no standard deviation.
    """
    if rewards.shape[-1] < 2:
        raise ValueError("a group of 1 has no standard deviation: draw at least 2 samples per image")
    rewards = _at_least_float32(rewards)
    rewards = rewards - rewards[..., :1]  # changes nothing but rounding: equal ones become 0, and so does their mean
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    spread = jnp.std(rewards, axis=-1, ddof=1, keepdims=True)
    return jnp.clip(centred / (spread + EPSILON), -max_advantage, max_advantage)


def policy_terms(
    new: Float[Array, "B G N"], old: Float[Array, "B G N"], advantages: Float[Array, "B G"], *, clip_range: float = 0.2
) -> PolicyTerms:
    """PPO's clipped objective per code, with the advantage of the whole sequence.

    Args:
      new: log-probabilities of the sampled codes under the policy that learns.
      old: those under the policy that drew them; no gradient flows into them.
      advantages: of each sample.
      clip_range: ε.
    """
    ratio = jnp.exp(new - jax.lax.stop_gradient(old))
    clipped = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
    advantages = jax.lax.stop_gradient(advantages)[..., None]
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    outside = jnp.abs(ratio - 1.0) > clip_range
    return PolicyTerms(-jnp.mean(objective), jnp.mean(ratio), jnp.mean(outside.astype(ratio.dtype)))


def kl_to_reference(new: Float[Array, "B G N"], reference: Float[Array, "B G N"]) -> Float[Array, ""]:
    """Mean of the k3 estimator exp(d) - d - 1, d = log π_ref - log π_new, at the sampled codes; never negative.

    References:
      Schulman 2020, "Approximating KL divergence".
    """
    difference = jax.lax.stop_gradient(reference) - new
    return jnp.mean(jnp.exp(difference) - difference - 1.0)


def entropy(logits: Float[Array, "B N K"]) -> Float[Array, ""]:
    """Mean entropy of the predicted distributions, in nats."""
    log_probabilities = jax.nn.log_softmax(_at_least_float32(logits), axis=-1)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1))


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
