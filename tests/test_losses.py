"""Known values, gradients and invariances of the pure functions; and that they need nothing but jax."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from rear_jax import losses, noise


def test_cross_entropy_known_values():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    np.testing.assert_allclose(
        losses.next_code_cross_entropy(logits, jnp.array([0, 2])), -np.log([0.7, 0.5]), rtol=1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["float32", "bfloat16", "float16"]), st.floats(-50, 50))
def test_cross_entropy_is_shift_invariant_in_float32(dtype, shift):
    logits = jnp.array([[1.0, 2.0, -3.0]], dtype)
    codes = jnp.array([1])
    value = losses.next_code_cross_entropy(logits, codes)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(
        losses.next_code_cross_entropy(logits.astype("float32") + shift, codes), value, atol=1e-5
    )


def test_correct_codes_is_the_argmax():
    logits = jnp.array([[0.0, 1.0], [3.0, 1.0]])
    np.testing.assert_array_equal(losses.correct_codes(logits, jnp.array([1, 1])), [1.0, 0.0])


def test_negative_cosine_known_values_and_zero_vectors():
    x = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    y = jnp.array([[2.0, 0.0], [-3.0, -3.0], [1.0, 0.0]])
    np.testing.assert_allclose(losses.negative_cosine(x, y), [-1.0, 1.0, 0.0], atol=1e-6)
    gradient = jax.grad(lambda x: losses.negative_cosine(x, y).sum())(x)
    assert jnp.isfinite(gradient).all()


@pytest.mark.slow
def test_gradients_against_finite_differences():
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (2, 3, 4)), jax.random.normal(jax.random.key(1), (2, 3, 4))
    check_grads(lambda x: losses.negative_cosine(x, y).sum(), (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    codes = jnp.array([[0, 1, 2], [3, 0, 1]])
    check_grads(lambda x: losses.next_code_cross_entropy(x, codes).sum(), (x,), 1, modes=["rev"], atol=1e-2, rtol=1e-2)


class TestEmbeddingLosses:
    shallow, deep, target = (jax.random.normal(jax.random.key(i), (2, 4, 3)) for i in range(3))
    replaced = jnp.array([[True, False, False, True], [False, False, True, False]])

    def losses(self, replaced, reading):
        return losses.codebook_embedding_losses(self.shallow, self.deep, self.target, replaced, reading=reading)

    def test_released_leaves_replaced_out_but_divides_by_all(self):
        cosines = losses.negative_cosine(self.shallow, self.target)
        expected = jnp.sum(cosines * ~self.replaced) / cosines.size
        np.testing.assert_allclose(self.losses(self.replaced, "released").shallow, expected, rtol=1e-6)

    def test_readings_agree_without_noise(self):
        none = jnp.zeros_like(self.replaced)
        assert self.losses(none, "released") == self.losses(none, "paper")

    def test_deep_term_ignores_noise(self):
        assert self.losses(self.replaced, "released").deep == self.losses(self.replaced, "paper").deep

    def test_targets_are_frozen(self):
        def total(target):
            terms = losses.codebook_embedding_losses(self.shallow, self.deep, target, self.replaced)
            return terms.shallow + terms.deep

        np.testing.assert_array_equal(jax.grad(total)(self.target), 0.0)

    def test_unknown_reading(self):
        with pytest.raises(ValueError, match="released"):
            self.losses(self.replaced, "mine")


def test_hinge_losses():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-2.0, 0.0])
    assert losses.hinge_discriminator(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))
    assert losses.hinge_generator(fake) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "progress", "ceiling"),
    [
        ("annealed", 0.0, 1.0),
        ("annealed", 0.375, 0.5),
        ("annealed", 0.75, 0.0),
        ("annealed", 1.0, 0.0),
        ("linear", 0.25, 0.75),
        ("uniform", 0.9, 0.5),
        ("none", 0.0, 0.0),
    ],
)
def test_noise_rates_fill_the_interval_below_the_ceiling(schedule, progress, ceiling):
    rates = noise.noise_rates(jax.random.key(0), schedule, progress, 4096, rate=0.5)
    assert rates.min() >= 0
    assert rates.max() <= ceiling
    np.testing.assert_allclose(rates.mean(), ceiling / 2, atol=0.02)


def test_fixed_rate_is_not_drawn():
    np.testing.assert_array_equal(noise.noise_rates(jax.random.key(0), "fixed", 0.3, 5, rate=0.25), 0.25)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="annealed"):
        noise.noise_rates(jax.random.key(0), "cosine", 0.0, 1)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.booleans(), st.integers(0, 2**31 - 1))
def test_corrupt_changes_only_what_it_says(codebook_size, different, seed):
    codes = jax.random.randint(jax.random.key(seed), (3, 50), 0, codebook_size)
    noisy, replaced = noise.corrupt(
        jax.random.key(seed + 1), codes, jnp.array([0.0, 0.5, 1.0]), codebook_size, different=different
    )
    assert noisy.min() >= 0
    assert noisy.max() < codebook_size
    np.testing.assert_array_equal(noisy[~replaced], codes[~replaced])
    assert not replaced[0].any()
    assert replaced[2].all()
    if different:
        assert (noisy != codes)[replaced].all()


def test_corrupt_draws_uniformly():
    codes = jnp.zeros((64, 500), jnp.int32)
    noisy, _ = noise.corrupt(jax.random.key(0), codes, jnp.ones(64), 4)
    np.testing.assert_allclose(np.bincount(noisy.ravel()) / noisy.size, 0.25, atol=0.01)


def test_drop_labels():
    labels = noise.drop_labels(jax.random.key(0), jnp.zeros(10_000, jnp.int32), 10, 0.1)
    assert set(np.unique(labels)) == {0, 10}
    assert (labels == 10).mean() == pytest.approx(0.1, abs=0.01)


def test_floor_zero_needs_nothing_but_jax():
    """In an interpreter where none of the project's other dependencies can be imported."""
    script = """
import sys
blocked = {"flax", "optax", "orbax", "ml_collections", "jaxtyping", "chex", "absl", "grain", "tensorflow_datasets"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
from rear_jax import grpo, guidance, losses, noise, orders
"""
    subprocess.run([sys.executable, "-c", script], check=True)
