"""VA-π's objective against the authors' terms and gradients, in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import grpo, losses

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def check(golden) -> None:
    with jax.enable_x64(True):
        _check(golden)


def _check(golden) -> None:
    meta = json.loads(str(golden["meta"]))
    samples, tokens = golden["in/sampled_tokens"], golden["in/tokens"]
    old, reference = (
        grpo.gather_log_probabilities(jnp.asarray(golden[f"in/{name}_logits"]), samples)
        for name in ("old", "reference")
    )
    unclipped = grpo.group_advantages(jnp.asarray(golden["in/rewards"]), max_advantage=np.inf)
    advantages = grpo.group_advantages(jnp.asarray(golden["in/rewards"]), max_advantage=meta["max_advantage"])
    np.testing.assert_allclose(unclipped, golden["out/advantages"], **CLOSE)
    np.testing.assert_allclose(advantages, golden["out/clipped_advantages"], **CLOSE)

    def terms(logits):
        new = grpo.gather_log_probabilities(logits, samples)
        policy = grpo.policy_terms(new, old, advantages, clip_range=meta["clip_range"])
        prior = jnp.mean(losses.next_code_cross_entropy(logits, tokens))
        return policy, prior, grpo.kl_to_reference(new, reference)

    logits = jnp.asarray(golden["in/new_logits"])
    policy, prior, kl = terms(logits)
    found = {
        "policy_loss": policy.loss,
        "ratio_mean": policy.ratio,
        "clip_fraction": policy.clip_share,
        "prior_loss": prior,
        "kl": kl,
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[f"out/{name}"], err_msg=name, **CLOSE)

    weights = {"ce": (meta["prior_weight"], 0.0), "kl": (0.0, meta["kl_weight"])}
    weights["ce_kl"] = (meta["prior_weight"], meta["kl_weight"])
    for name, (prior_weight, kl_weight) in weights.items():

        def total(logits, prior_weight=prior_weight, kl_weight=kl_weight):
            policy, prior, kl = terms(logits)
            return policy.loss + prior_weight * prior + kl_weight * kl

        loss, gradient = jax.value_and_grad(total)(logits)
        np.testing.assert_allclose(loss, golden[f"out/loss_{name}"], err_msg=name, **CLOSE)
        np.testing.assert_allclose(gradient, golden[f"out/grad_{name}"], err_msg=name, **CLOSE)
