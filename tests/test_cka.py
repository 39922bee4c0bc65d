"""CKA and HSIC against their definitions, and what the diagnostics do to codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.metrics import cka, codes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 7)).astype(np.float32)


def rotated(features, width):
    """The features under an orthogonal map into `width` dimensions, moved and scaled."""
    basis, _ = np.linalg.qr(RNG.normal(size=(width, width)))
    return (3.0 * features @ basis[: features.shape[1]] + 5.0).astype(np.float32)


def hsic_by_definition(x, y):
    """Song et al. 2012, equation 5, with the n × n matrices written out in float64."""
    n, ones = len(x), np.ones(len(x))
    k, l = (np.float64(a) @ np.float64(a).T for a in (x, y))  # noqa: E741
    np.fill_diagonal(k, 0.0)
    np.fill_diagonal(l, 0.0)
    middle = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2.0 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))


def test_hsic_is_its_definition_wherever_the_features_lie():
    y = X[:, :3] ** 2 + 0.1 * RNG.normal(size=(60, 3)).astype(np.float32)
    wanted = hsic_by_definition(X, y)
    np.testing.assert_allclose(cka.unbiased_hsic(X, y), wanted, rtol=1e-5)
    np.testing.assert_allclose(cka.unbiased_hsic(X + 10.0, y - 3.0), wanted, rtol=1e-4)


def test_biased_cka_is_its_definition():
    y = np.tanh(X[:, :4])
    centre = np.eye(60) - 1.0 / 60
    k, l = (centre @ np.float64(a) @ np.float64(a).T @ centre for a in (X, y))  # noqa: E741
    np.testing.assert_allclose(cka.cka(X, y), (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()), rtol=1e-5)


@pytest.mark.parametrize("of", [cka.cka, cka.unbiased_cka])
@pytest.mark.parametrize("width", [7, 12])
def test_a_rotated_copy_is_the_same(of, width):
    np.testing.assert_allclose(of(X, rotated(X, width)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(of(X, X), 1.0, rtol=1e-6)


def test_independent_features_have_none_and_only_the_unbiased_form_says_so():
    x, y = (RNG.normal(size=(200, 300)).astype(np.float32) for _ in range(2))
    assert cka.cka(x, y) > 0.5
    assert abs(cka.unbiased_cka(x, y)) < 0.02


def test_batches_give_what_the_whole_set_gives():
    x = RNG.normal(size=(4096, 16)).astype(np.float32)
    y = np.tanh(x @ RNG.normal(size=(16, 8)).astype(np.float32)) + RNG.normal(size=(4096, 8)).astype(np.float32)
    hsic = jax.jit(jax.vmap(cka.unbiased_hsic))
    parts = [part.reshape(64, 64, -1) for part in (x, y)]
    found = cka.cka_of_batches(hsic(*parts), hsic(parts[0], parts[0]), hsic(parts[1], parts[1]))
    whole = float(cka.unbiased_cka(x, y))
    assert 0.1 < whole < 0.9
    assert abs(found - whole) < 0.02
    biased = np.mean([cka.cka(a, b) for a, b in zip(*parts, strict=True)])
    assert biased > whole + 0.05


def test_constant_features_say_nothing():
    constant = np.ones((60, 3), np.float32)
    assert cka.cka(X, constant) == cka.unbiased_cka(X, constant) == 0.0
    assert cka.cka_of_batches(np.zeros(1), np.zeros(1), np.ones(1)) == 0.0


def test_three_examples_are_too_few():
    with pytest.raises(RearError, match="needs 4 examples or more, there are 3"):
        cka.unbiased_hsic(X[:3], X[:3])


KEYS = jax.random.split(jax.random.key(0), 50)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.29, 29), (0.295, 29), (0.1 + 0.2, 30), (1.0, 100)])
def test_shares_are_rounded_down_but_for_rounding(share, count):
    assert codes.count_of(share, 100) == count


def test_masks_have_their_count_and_grow():
    masks = [np.asarray(codes.interleaved_mask(KEYS, 20, count)) for count in range(21)]
    assert [mask.sum(axis=1).tolist() for mask in masks] == [[count] * 50 for count in range(21)]
    assert all((smaller <= larger).all() for smaller, larger in itertools.pairwise(masks))
    assert masks[10].mean(axis=0).min() > 0.3  # every position has its turn
    assert len(np.unique(masks[10], axis=0)) == 50
    np.testing.assert_array_equal(codes.interleaved_mask(KEYS[3:4], 20, 10), masks[10][3:4])
    np.testing.assert_array_equal(codes.front_mask(2, 4, 3), [[True, True, True, False]] * 2)


def test_the_nearest_wrong_code_is_found_and_is_never_the_code_itself():
    codebook = np.array([[1, 0], [10, 1], [0, 2], [-1, 0.1], [0, 0]], np.float32)
    np.testing.assert_array_equal(codes.nearest_wrong(codebook)[:4], [1, 0, 1, 2])
    large = RNG.normal(size=(700, 3)).astype(np.float32)
    large[5] = large[6]  # two codes with one vector
    found = np.asarray(codes.nearest_wrong(large))
    cosines = large @ large.T / np.outer(*(np.linalg.norm(large, axis=1),) * 2)
    np.fill_diagonal(cosines, -np.inf)
    np.testing.assert_allclose(cosines[np.arange(700), found], cosines.max(axis=1), atol=1e-6)
    assert (found != np.arange(700)).all()
    assert (found[5], found[6]) == (6, 5)
    assert (codes.nearest_wrong(jnp.zeros((3, 2))) != jnp.arange(3)).all()
    with pytest.raises(RearError, match="has no wrong code"):
        codes.nearest_wrong(jnp.zeros((1, 2)))


def test_wrong_codes_are_replaced_and_right_ones_stay():
    true, predicted = (np.asarray(jax.random.randint(jax.random.key(n), (50, 40), 0, 5)) for n in range(2))
    nearest = np.array([4, 0, 1, 2, 3])
    replaced = {r: np.asarray(codes.replace_wrong(KEYS, predicted, true, nearest, r)) for r in (0.0, 0.3, 0.6, 1.0)}
    np.testing.assert_array_equal(replaced[0.0], predicted)
    np.testing.assert_array_equal(replaced[1.0], np.where(predicted == true, true, nearest[true]))
    for codes_at in replaced.values():
        np.testing.assert_array_equal(codes_at == true, predicted == true)
    wrong = predicted != true
    near = {r: (codes_at == nearest[true])[wrong & (predicted != nearest[true])] for r, codes_at in replaced.items()}
    assert abs(near[0.3].mean() - 0.3) < 0.05
    assert (near[0.3] <= near[0.6]).all()
