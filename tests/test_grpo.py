"""GRPO's pure functions: known values, the shared context against the G-fold form, and what must not break."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import grpo, losses

KEY = jax.random.key(0)
B, G, N, K = 3, 4, 5, 7


def test_advantages_by_hand():
    found = grpo.group_advantages(jnp.array([[1.0, 2.0, 3.0]]))
    np.testing.assert_allclose(found, [[-1.0, 0.0, 1.0]], atol=1e-6)


def test_advantages_are_clipped():
    rewards = jnp.array([[0.0] * 99 + [1.0]])
    assert grpo.group_advantages(rewards).max() == 5.0
    assert grpo.group_advantages(rewards, max_advantage=100.0).max() == pytest.approx(9.9, abs=1e-3)


@pytest.mark.parametrize("group", range(2, 17))
def test_equal_rewards_give_exactly_zero(group):
    """Whatever the reward: the mean of equal numbers may be off by their last digit, which must not become a gain."""
    rewards = jnp.repeat(10.0 ** jnp.array([[-3.0], [0.0], [3.0]]) * jax.random.normal(KEY, (3, 500)), group)
    advantages = grpo.group_advantages(rewards.reshape(-1, group))
    np.testing.assert_array_equal(advantages, np.zeros((1500, group)))


def test_advantages_ignore_shift_and_scale_of_rewards():
    rewards = jax.random.normal(KEY, (B, G))
    np.testing.assert_allclose(
        grpo.group_advantages(rewards), grpo.group_advantages(3.0 * rewards - 7.0), rtol=1e-4, atol=1e-5
    )


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        grpo.group_advantages(jnp.zeros((4, 1)))


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]))
    samples = grpo.draw_groups(KEY, logits, 20_000)
    assert samples.shape == (1, 20_000, 2)
    shares = np.stack([np.bincount(samples[0, :, n], minlength=3) / 20_000 for n in range(2)])
    np.testing.assert_allclose(shares, np.exp(logits[0]), atol=0.015)


def test_samples_of_a_group_differ_and_positions_are_independent():
    samples = np.asarray(grpo.draw_groups(KEY, jnp.zeros((1, 2, 2)), 4000))[0]
    assert abs(np.corrcoef(samples.T)[0, 1]) < 0.05


@pytest.mark.slow
def test_ratio_is_one_before_any_update():
    logits = jax.random.normal(KEY, (B, N, K))
    samples = grpo.draw_groups(KEY, logits, G)
    new = grpo.gather_log_probabilities(logits, samples)
    terms = grpo.policy_terms(new, new, jax.random.normal(KEY, (B, G)))
    assert terms.ratio == 1.0
    assert terms.clip_share == 0.0


def test_clipping_by_hand():
    """ρ = 2: a gain is capped at 1.2 A, a loss is not; ρ = ½: a gain is not capped, a loss is at 0.8 A."""
    ratios, advantages = jnp.array([2.0, 2.0, 0.5, 0.5]), jnp.array([[1.0, -1.0, 1.0, -1.0]])
    terms = grpo.policy_terms(jnp.log(ratios)[None, :, None], jnp.zeros((1, 4, 1)), advantages)
    np.testing.assert_allclose(terms.loss, -np.mean([1.2, -2.0, 0.5, -0.8]), rtol=1e-6)
    assert terms.clip_share == 1.0


def test_kl_is_zero_at_the_reference_and_positive_elsewhere():
    a, b = jax.random.normal(KEY, (2, B, G, N))
    assert grpo.kl_to_reference(a, a) == 0.0
    assert grpo.kl_to_reference(a, b) > 0.0


def test_kl_estimates_the_divergence():
    """The mean of k3 over samples of π_new is KL(π_new ‖ π_ref)."""
    new, reference = jax.random.normal(KEY, (2, 1, 1, 5))
    samples = grpo.draw_groups(KEY, new, 200_000)
    found = grpo.kl_to_reference(*(grpo.gather_log_probabilities(x, samples) for x in (new, reference)))
    p, q = jax.nn.log_softmax(new), jax.nn.log_softmax(reference)
    np.testing.assert_allclose(found, jnp.sum(jnp.exp(p) * (p - q)), rtol=0.02)


def test_entropy_of_a_uniform_distribution():
    np.testing.assert_allclose(grpo.entropy(jnp.zeros((B, N, K))), np.log(K), rtol=1e-6)


@jax.enable_x64(True)
def test_one_context_equals_the_g_fold_form():
    """Loss and gradients, with the context repeated G times as the released code does it, in float64."""
    logits, samples = jax.random.normal(KEY, (B, N, K)), jax.random.randint(KEY, (B, G, N), 0, K)
    old = grpo.gather_log_probabilities(logits + 0.3 * jax.random.normal(jax.random.key(1), logits.shape), samples)
    advantages, codes = jax.random.normal(KEY, (B, G)), samples[:, 0]

    def shared(logits):
        new = grpo.gather_log_probabilities(logits, samples)
        return grpo.policy_terms(new, old, advantages).loss + 0.1 * jnp.mean(
            losses.next_code_cross_entropy(logits, codes)
        )

    def repeated(logits):
        many = jnp.repeat(logits, G, axis=0)  # [B G, N, K], as if each sample had been run
        new = -losses.next_code_cross_entropy(many, samples.reshape(-1, N)).reshape(B, G, N)
        prior = losses.next_code_cross_entropy(many, jnp.repeat(codes, G, axis=0))
        return grpo.policy_terms(new, old, advantages).loss + 0.1 * jnp.mean(prior)

    (a, da), (b, db) = (jax.value_and_grad(f)(logits) for f in (shared, repeated))
    assert a.dtype == da.dtype == jnp.float64
    np.testing.assert_allclose(a, b, rtol=1e-9)
    np.testing.assert_allclose(da, db, rtol=1e-9, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    logits = jax.random.normal(KEY, (B, N, K), jnp.bfloat16)
    samples = grpo.draw_groups(KEY, logits, G)
    assert grpo.gather_log_probabilities(logits, samples).dtype == jnp.float32
    assert grpo.group_advantages(jnp.zeros((2, 2), jnp.bfloat16)).dtype == jnp.float32
