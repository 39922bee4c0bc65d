"""Guidance schedules and sampling filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rear_jax import guidance


def test_power_cosine_known_values():
    weights = [float(guidance.guidance_weight("power_cosine", 5.0, s, 4, power=1.0)) for s in range(5)]
    np.testing.assert_allclose(
        weights, [1.0, 1 + 4 * 0.5 * (1 - np.cos(np.pi / 4)), 3.0, 1 + 4 * 0.853553, 5.0], rtol=1e-5
    )
    late = guidance.guidance_weight("power_cosine", 5.0, 2, 4, power=2.0)
    assert float(late) == pytest.approx(1 + 4 * 0.5 * (1 - np.cos(np.pi / 4)), rel=1e-5)


@pytest.mark.parametrize("step", [0, 3])
def test_power_zero_and_constant_are_full_strength(step):
    assert float(guidance.guidance_weight("power_cosine", 7.0, step, 4, power=0.0)) == pytest.approx(7.0, rel=1e-6)
    assert float(guidance.guidance_weight("constant", 7.0, step, 4)) == 7.0


def test_linear():
    assert float(guidance.guidance_weight("linear", 3.0, 1, 4)) == 1.5


@pytest.mark.parametrize(("interval", "guided"), [(-1, [0, 1, 2, 3]), (0, [0, 1]), (1, [0, 1, 2]), (9, [0, 1, 2, 3])])
def test_interval_counts_from_the_second_code(interval, guided):
    weights = [float(guidance.guidance_weight("constant", 3.0, n, 4, interval=interval)) for n in range(4)]
    assert weights == [3.0 if n in guided else 1.0 for n in range(4)]


def test_interval_of_another_schedule():
    weights = [float(guidance.guidance_weight("linear", 3.0, n, 4, interval=1)) for n in range(4)]
    assert weights == [1.0, 1.5, 2.0, 1.0]


def test_unknown_schedule():
    with pytest.raises(ValueError, match="power_cosine"):
        guidance.guidance_weight("cosine", 2.0, 0, 4)


def test_guide_ends():
    c, u = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -1.0]])
    np.testing.assert_allclose(guidance.guide(c, u, 1.0), c)
    np.testing.assert_allclose(guidance.guide(c, u, 0.0), u)
    np.testing.assert_allclose(guidance.guide(c, u, 3.0), [[2.0, 8.0]])


def test_top_k_known():
    logits = jnp.array([[1.0, 3.0, 2.0, 3.0]])
    np.testing.assert_array_equal(guidance.keep_top_k(logits, 3), [[-np.inf, 3.0, 2.0, 3.0]])
    np.testing.assert_array_equal(guidance.keep_top_k(logits, 0), logits)
    np.testing.assert_array_equal(guidance.keep_top_k(logits, 9), logits)


def test_top_p_known():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25]]))
    kept = jnp.isfinite(guidance.keep_top_p(logits, 0.6))
    np.testing.assert_array_equal(kept, [[False, True, False, True]])  # 0.5, then the one that crosses 0.6
    np.testing.assert_array_equal(jnp.isfinite(guidance.keep_top_p(logits, 0.0)), [[False, True, False, False]])


@pytest.mark.parametrize("traced", [False, True])
def test_the_kth_code_stays_in_a_compiled_program(traced):
    """A compiler may compute logits twice, once for the threshold, and round them in two ways."""
    rng = np.random.default_rng(0)
    weights, start = (jnp.asarray(rng.normal(size=(size, 16)).astype(np.float32)) for size in (16, 512))

    @jax.jit
    def kept(start, k):
        def step(hidden, n):
            conditional, unconditional = jnp.split(logits := hidden @ weights, 2)
            weight = guidance.guidance_weight("power_cosine", 2.0, n, 64)
            guided = guidance.guide(conditional, unconditional, weight) / 1.5
            return jnp.tanh(logits + n), jnp.isfinite(guidance.keep_top_k(guided, k if traced else 9)).sum(-1)

        return jax.lax.scan(step, start, jnp.arange(64.0))[1]

    assert set(np.unique(kept(start, jnp.int32(9)))) == {9}


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(0.0, 1.0))
def test_filters_keep_the_best_and_what_they_keep_is_unchanged(seed, k, p):
    logits = jax.random.normal(jax.random.key(seed), (4, 16))
    for kept in (guidance.keep_top_k(logits, k), guidance.keep_top_p(logits, p)):
        finite = np.isfinite(kept)
        np.testing.assert_array_equal(np.asarray(kept)[finite], np.asarray(logits)[finite])
        assert finite[np.arange(4), np.argmax(logits, axis=-1)].all()
    assert np.isfinite(guidance.keep_top_k(logits, k)).sum(axis=-1).max() <= max(k, 16 if k > 16 else k)


def test_draw_frequencies_and_greedy():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = guidance.draw(keys, jnp.repeat(logits, 4000, axis=0))
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.2, 0.5, 0.3], atol=0.03)
    assert (guidance.draw(keys[:5], jnp.repeat(logits, 5, axis=0), temperature=0.0) == 1).all()
    cold = guidance.draw(keys, jnp.repeat(logits, 4000, axis=0), temperature=0.5)
    squared = np.array([0.04, 0.25, 0.09])
    np.testing.assert_allclose(np.bincount(cold) / 4000, squared / squared.sum(), atol=0.03)
    assert set(np.unique(guidance.draw(keys, jnp.repeat(logits, 4000, axis=0), top_k=2))) == {1, 2}


def test_draw_does_not_depend_on_neighbours():
    logits = jax.random.normal(jax.random.key(0), (6, 8))
    keys = jax.random.split(jax.random.key(1), 6)
    np.testing.assert_array_equal(guidance.draw(keys, logits)[2:4], guidance.draw(keys[2:4], logits[2:4]))
