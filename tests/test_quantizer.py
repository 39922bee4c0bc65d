"""Vector quantisation: values by hand, gradients, moving averages, revival."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.tokenizers import quantizer

CODEBOOK = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])


def random_latents(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_nearest_codes_by_hand() -> None:
    latents = jnp.array([[[0.1, 0.2], [0.9, -0.3]], [[0.3, 1.5], [-4.0, 0.0]]])
    codes = quantizer.nearest_codes(latents, CODEBOOK)
    np.testing.assert_array_equal(codes, [[0, 1], [2, 0]])
    assert codes.dtype == jnp.int32


def test_a_tie_goes_to_the_lowest_index() -> None:
    assert quantizer.nearest_codes(jnp.array([0.5, 0.0]), CODEBOOK) == 0
    assert quantizer.nearest_codes(jnp.array([5.0, 5.0]), jnp.ones((4, 2))) == 0


def test_nearest_codes_is_the_argmin_of_all_distances() -> None:
    latents, codebook = random_latents(0, 3, 7, 5), random_latents(1, 11, 5)
    distances = np.square(np.asarray(latents)[..., None, :] - np.asarray(codebook)).sum(-1)
    np.testing.assert_array_equal(quantizer.nearest_codes(latents, codebook), distances.argmin(-1))


def test_half_precision_latents_are_compared_in_float32() -> None:
    latents, codebook = random_latents(0, 64, 8).astype(jnp.bfloat16), random_latents(1, 32, 8)
    want = quantizer.nearest_codes(latents.astype(jnp.float32), codebook)
    np.testing.assert_array_equal(quantizer.nearest_codes(latents, codebook), want)


def test_codes_of_codebook_vectors_are_their_indices() -> None:
    codebook = random_latents(0, 16, 4)
    for l2_normalize in (False, True):
        vectors = quantizer.look_up(jnp.arange(16), codebook, l2_normalize=l2_normalize)
        codes = quantizer.search(vectors, codebook, l2_normalize=l2_normalize)
        np.testing.assert_array_equal(codes, np.arange(16))


def test_normalised_search_ignores_the_length_of_latents_and_codes() -> None:
    latents, codebook = random_latents(0, 40, 6), random_latents(1, 9, 6)
    stretch = jnp.linspace(0.01, 30.0, 40)[:, None]
    want = quantizer.quantize(latents, codebook, l2_normalize=True)
    got = quantizer.quantize(latents * stretch, codebook * jnp.arange(1.0, 10.0)[:, None], l2_normalize=True)
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_allclose(got.vectors, want.vectors, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(got.vectors, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(got.commitment_loss, want.commitment_loss, rtol=1e-5)


def test_the_unit_vector_of_zero_is_zero_with_a_finite_gradient() -> None:
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(quantizer.unit(x)))(jnp.zeros(3))
    assert value == 0
    assert jnp.all(jnp.isfinite(gradient))


def test_losses_by_hand() -> None:
    quantized = quantizer.quantize(jnp.array([[0.1, 0.2], [0.9, -0.3]]), CODEBOOK, l2_normalize=False)
    np.testing.assert_allclose(quantized.vectors, [[0.0, 0.0], [1.0, 0.0]], atol=1e-7)
    for loss in (quantized.commitment_loss, quantized.codebook_loss):
        np.testing.assert_allclose(loss, (0.01 + 0.04 + 0.01 + 0.09) / 4, rtol=1e-5)


@pytest.mark.slow
def test_gradients_go_where_each_term_sends_them() -> None:
    latents, codebook, weights = random_latents(0, 5, 2), random_latents(1, 3, 2), random_latents(2, 5, 2)

    def term(latents: jax.Array, codebook: jax.Array, name: str) -> jax.Array:
        return jnp.sum(getattr(quantizer.quantize(latents, codebook, l2_normalize=False), name) * weights)

    by_latents, by_codebook = jax.grad(term, (0, 1))(latents, codebook, "vectors")
    np.testing.assert_allclose(by_latents, weights, rtol=1e-6)  # straight through
    np.testing.assert_array_equal(by_codebook, 0.0)
    vectors = codebook[quantizer.nearest_codes(latents, codebook)]
    by_latents, by_codebook = jax.grad(term, (0, 1))(latents, codebook, "commitment_loss")
    np.testing.assert_allclose(by_latents, jnp.sum(weights) * 2 * (latents - vectors) / latents.size, rtol=1e-5)
    np.testing.assert_array_equal(by_codebook, 0.0)
    by_latents, by_codebook = jax.grad(term, (0, 1))(latents, codebook, "codebook_loss")
    np.testing.assert_array_equal(by_latents, 0.0)
    assert jnp.any(by_codebook != 0)


def test_moving_average_by_hand() -> None:
    latents = jnp.array([[0.2, 0.0], [0.4, 0.0], [1.2, 0.2], [0.0, 3.0]])
    codes = jnp.array([0, 0, 1, 2])
    state = quantizer.init_codebook_state(CODEBOOK, method="ema")
    codebook, state = quantizer.update_codebook(
        CODEBOOK, state, latents, codes, jax.random.key(0), decay=0.9, revive_below=0.0, method="ema"
    )
    # a uniform share is 4 latents / 3 codes, so that counts and sums are in units of 4/3
    usage = 0.9 + 0.1 * np.array([2, 1, 1]) * 3 / 4
    sums = 0.9 * np.asarray(CODEBOOK) + 0.1 * np.array([[0.6, 0.0], [1.2, 0.2], [0.0, 3.0]]) * 3 / 4
    np.testing.assert_allclose(state.usage, usage, rtol=1e-6)
    np.testing.assert_allclose(state.sums, sums, rtol=1e-6)
    np.testing.assert_allclose(codebook, sums / usage[:, None], rtol=1e-4)


def test_moving_average_settles_at_the_mean_of_its_latents() -> None:
    latents, codes = random_latents(0, 30, 2), jnp.arange(30) % 3
    codebook, state = CODEBOOK, quantizer.init_codebook_state(CODEBOOK, method="ema")
    for step in range(40):
        codebook, state = quantizer.update_codebook(
            codebook, state, latents, codes, jax.random.key(step), decay=0.5, revive_below=0.0, method="ema"
        )
    np.testing.assert_allclose(codebook, latents.reshape(10, 3, 2).mean(0), atol=1e-5)


@pytest.mark.parametrize("method", ["gradient", "ema"])
def test_a_dead_code_becomes_a_latent_of_the_batch_and_the_living_stay(method: str) -> None:
    latents, codes = random_latents(0, 8, 3, 2), jnp.ones((8, 3), jnp.int32).at[:4].set(2)
    update = jax.jit(quantizer.update_codebook, static_argnames=("decay", "revive_below", "method"))
    kept, _ = update(
        CODEBOOK,
        quantizer.init_codebook_state(CODEBOOK, method=method),
        latents,
        codes,
        jax.random.key(7),
        decay=0.5,
        revive_below=0.0,
        method=method,
    )
    codebook, state = update(
        CODEBOOK,
        quantizer.init_codebook_state(CODEBOOK, method=method),
        latents,
        codes,
        jax.random.key(7),
        decay=0.5,
        revive_below=0.6,
        method=method,
    )
    np.testing.assert_array_equal(codebook[1:], kept[1:])
    assert not jnp.any(jnp.all(latents.reshape(-1, 2) == kept[0], axis=-1))
    assert jnp.any(jnp.all(latents.reshape(-1, 2) == codebook[0], axis=-1))
    np.testing.assert_allclose(state.usage, [1.0, 1.25, 1.25])
    if method == "gradient":
        assert state.sums is None
        np.testing.assert_array_equal(codebook[1:], CODEBOOK[1:])
    else:
        np.testing.assert_array_equal(state.sums[0], codebook[0])


def test_usage_and_revival_depend_on_shares_not_on_the_batch_size() -> None:
    latents, codes = random_latents(0, 6, 2), jnp.array([0, 0, 0, 1, 1, 2])
    state = quantizer.init_codebook_state(CODEBOOK, method="ema")
    key = jax.random.key(0)
    once = quantizer.update_codebook(CODEBOOK, state, latents, codes, key, decay=0.9, revive_below=0.0, method="ema")
    thrice = quantizer.update_codebook(
        CODEBOOK, state, jnp.tile(latents, (3, 1)), jnp.tile(codes, 3), key, decay=0.9, revive_below=0.0, method="ema"
    )
    chex.assert_trees_all_close(once, thrice, rtol=1e-5, atol=1e-7)


def test_unknown_method_is_refused() -> None:
    state = quantizer.init_codebook_state(CODEBOOK, method="gradient")
    with pytest.raises(ValueError, match="use 'gradient' or 'ema'"):
        quantizer.update_codebook(
            CODEBOOK,
            state,
            jnp.zeros((1, 2)),
            jnp.zeros(1, jnp.int32),
            jax.random.key(0),
            decay=0.9,
            revive_below=0.0,
            method="kmeans",
        )


def test_usage_and_perplexity_by_hand() -> None:
    codes = jnp.array([[0, 0], [3, 3]])
    np.testing.assert_allclose(quantizer.codebook_usage(codes, 8), 0.25)
    np.testing.assert_allclose(quantizer.perplexity(codes, 8), 2.0, rtol=1e-6)
    np.testing.assert_allclose(quantizer.perplexity(jnp.arange(8), 8), 8.0, rtol=1e-6)
    np.testing.assert_allclose(quantizer.perplexity(jnp.zeros(5, jnp.int32), 8), 1.0, rtol=1e-6)
