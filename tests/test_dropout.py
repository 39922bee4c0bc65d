"""The hash that dropout is drawn by: its mask depends on the place alone, and has the statistics of a random one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.generators.dropout import Dropout, at, drop, drop_weights

RATE, KEY = 0.1, jax.random.key(0)


@functools.cache
def masks(seed: int = 0, step: int = 0, layer: int = 0, site: int = 0) -> np.ndarray:
    """What survives of the attention weights [images 4, heads 4, 258, 258] at a place, as 0 and 1."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    dropout = Dropout.of(key, jnp.arange(4)).at(layer).at(site)
    return np.asarray(drop_weights(jnp.ones((4, 4, 258, 258)), RATE, dropout) > 0, np.float64)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks of equal size, in standard deviations of that of independent ones."""
    a, b = a.ravel() - (1 - RATE), b.ravel() - (1 - RATE)
    return (a * b).mean() / (RATE * (1 - RATE)) * np.sqrt(a.size)


@pytest.mark.slow
def test_the_rate_is_met():
    """In all, and in each row, column, head and image, within what chance allows (chi-square)."""
    dropped = 1 - masks()
    for axes in ((2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3)):
        counts, of = dropped.sum(axes), dropped.size / dropped.sum(axes).size
        square = ((counts - RATE * of) ** 2 / (RATE * (1 - RATE) * of)).sum()
        assert abs(square - counts.size) < 4.5 * np.sqrt(2 * counts.size)
    assert abs(dropped.mean() - RATE) < 4.5 * np.sqrt(RATE * (1 - RATE) / dropped.size)


@pytest.mark.parametrize("rate", [0.001, 0.5, 0.9])
def test_other_rates_are_met(rate):
    x = np.asarray(drop(jnp.ones((8, 100, 1000)), rate, Dropout.of(KEY, jnp.arange(8))))
    share = (x == 0).mean()
    assert abs(share - rate) < 4.5 * np.sqrt(rate * (1 - rate) / x.size)
    np.testing.assert_allclose(x[x > 0], 1 / (1 - rate), rtol=1e-6)


@pytest.mark.parametrize(
    "shift", [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (0, 16), (0, 128), (2, 0), (8, 0), (128, 0), (3, 5)]
)
def test_neighbours_are_independent(shift):
    """Along rows and columns, near and far."""
    moved = np.roll(masks(), shift, axis=(2, 3))
    assert abs(correlation(masks(), moved)) < 4.5


@pytest.mark.parametrize("other", [{"layer": 1}, {"layer": 23}, {"site": 1}, {"step": 1}, {"step": 1000}, {"seed": 1}])
def test_places_are_independent(other):
    """Layers, sites, steps and seeds; also shifted against each other, as a counter might repeat itself."""
    for shift in ((0, 0), (0, 1), (1, 0)):
        assert abs(correlation(masks(), np.roll(masks(**other), shift, axis=(2, 3)))) < 4.5


def test_heads_and_images_are_independent():
    assert abs(correlation(masks()[:, :-1], masks()[:, 1:])) < 4.5
    assert abs(correlation(masks()[:-1], masks()[1:])) < 4.5


def test_patterns_of_eight_have_their_frequencies():
    """Chi-square of the 256 patterns of eight neighbours in a row, and of eight in a column."""
    for mask in (masks(), masks().swapaxes(2, 3)):
        bits = mask[..., :256].reshape(-1, 8).astype(int)
        counts = np.bincount(bits @ 2 ** np.arange(8), minlength=256)
        kept = np.array([n.bit_count() for n in range(256)])
        expected = len(bits) * (1 - RATE) ** kept * RATE ** (8 - kept)
        often = expected > 5
        square = ((counts - expected)[often] ** 2 / expected[often]).sum()
        assert abs(square - often.sum()) < 4.5 * np.sqrt(2 * often.sum())


def test_a_mask_is_the_same_however_the_batch_is_cut():
    x = jnp.ones((8, 5, 6))
    whole = drop(x, RATE, Dropout.of(KEY, jnp.arange(8)))
    parts = [drop(x[part::2], RATE, Dropout.of(KEY, jnp.arange(8)[part::2])) for part in (0, 1)]
    np.testing.assert_array_equal(whole, jnp.stack(parts, 1).reshape(8, 5, 6))


def lowbias32(x: int, word: int = 0, *, last: bool = True) -> int:
    """The published hash, on unsigned integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15 ^ word) * 0x846CA68B % 2**32
    return x ^ x >> 16 if last else x


def test_the_mask_is_the_hash_of_the_place():
    """A run that goes on elsewhere, or in a kernel, must find it again."""
    golden, words, number = 0x9E3779B9, (123456789, 2**32 - 987654321), 3
    first = lowbias32((words[0] + number * golden) % 2**32)
    second = lowbias32(words[1] ^ lowbias32((number + golden) % 2**32))
    dropout = Dropout(jnp.array([[123456789, -987654321]], jnp.int32)).at(number)
    assert [word % 2**32 for word in dropout.words[0].tolist()] == [first, second] == [2084456529, 1412874311]
    hashes = [lowbias32((index + first) % 2**32, second, last=False) for index in range(64)]
    kept = [(x + 2**31) % 2**32 >= RATE * 2**32 for x in hashes]  # as a signed number, from the lowest on
    assert (np.asarray(drop(jnp.ones((1, 64)), RATE, dropout))[0] > 0).tolist() == kept


def test_split_is_at_for_every_number():
    dropout = Dropout.of(KEY, jnp.arange(3))
    for n, words in enumerate(dropout.split(4).words):
        np.testing.assert_array_equal(words, dropout.at(n).words)


def test_none_and_a_rate_of_zero_drop_nothing():
    x = jnp.ones((2, 3))
    assert drop(x, RATE, None) is x
    assert drop(x, 0.0, Dropout.of(KEY, jnp.arange(2))) is x
    assert at(None, 1) is None
