"""Preprocessing of CLIP and HPSv2: sizes, windows and padding, and what is exact in the form for devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rear_jax.metrics import clip_preprocess
from rear_jax.metrics.clip_preprocess import MEAN, STD, clip_pixels, clip_pixels_of_floats, cubic_weights, hps_pixels

BLACK = -np.float32(MEAN) / np.float32(STD)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    """Back to [0, 1]."""
    return np.asarray(pixels) * np.float32(STD) + np.float32(MEAN)


def test_sizes():
    assert clip_preprocess.shorter_side((480, 640), 224) == (224, 298)
    assert clip_preprocess.longer_side((480, 640), 224) == (168, 224)
    assert clip_preprocess.longer_side((1, 1000), 224) == (1, 224)
    assert clip_preprocess.centre((224, 298), 224) == (0, 37)
    assert clip_preprocess.centre((225, 227), 224) == (0, 2)  # halves of 1 and 3, to even


def test_an_image_of_the_right_size_is_only_normalised():
    image = noise(8, 8)
    want = (image / 255 - MEAN) / STD
    for found in (
        clip_pixels(image, 8),
        clip_pixels_of_floats(image / np.float32(255), 8),
        hps_pixels(image / np.float32(255), 8),
    ):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=1e-6)


def test_where_nothing_is_resized_both_forms_of_clip_are_the_same():
    image = noise(8, 13)
    np.testing.assert_allclose(clip_pixels_of_floats(image / np.float32(255), 8), clip_pixels(image, 8), atol=1e-6)
    np.testing.assert_allclose(clip_pixels(image, 8), (image[:, :, 2:10] / 255 - MEAN) / STD, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(8, 5), (5, 8), (4, 8)])
def test_hps_pads_with_black(height, width):
    found = np.asarray(hps_pixels(np.ones((1, height, width, 3), np.float32), 8))
    top, left = (8 - height) // 2, (8 - width) // 2
    want = np.broadcast_to(BLACK, (1, 8, 8, 3)).copy()
    want[:, top : top + height, left : left + width] = (1 - np.float32(MEAN)) / np.float32(STD)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("antialias", [True, False])
def test_hps_does_not_clip_what_overshoots_and_clip_does(antialias):
    edge = np.repeat(np.float32([0, 1]), 6)[None, None, :, None].repeat(12, 1).repeat(3, 3)
    assert grey(hps_pixels(edge, 9, antialias=antialias)).max() > 1.01
    assert grey(clip_pixels_of_floats(edge, 9)).max() <= 1 + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_weights_keep_what_is_even(length, wanted, antialias):
    weights = cubic_weights(length, wanted, antialias=antialias)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)  # left and right are alike
    if length == wanted:
        np.testing.assert_allclose(weights, np.eye(length), atol=1e-7)


@pytest.mark.parametrize("function", [clip_pixels_of_floats, hps_pixels])
def test_forms_for_devices_compile_and_have_gradients(function):
    images = jnp.asarray(noise(12, 9) / np.float32(255))
    np.testing.assert_allclose(jax.jit(function, static_argnums=1)(images, 8), function(images, 8), atol=1e-5)
    direction = jax.random.normal(jax.random.key(0), images.shape)
    inside = 0.25 + images / 2  # nothing is clipped
    value = lambda x: jnp.sum(jnp.sin(function(x, 8)))  # noqa: E731
    slope = jnp.vdot(jax.grad(value)(inside), direction)
    step = 1e-2
    difference = (value(inside + step * direction) - value(inside - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=2e-2)


def test_without_rounding_clip_is_a_level_off_at_most():
    image = noise(37, 51)
    near, exact = grey(clip_pixels_of_floats(image / np.float32(255), 16)), grey(clip_pixels(image, 16))
    assert 0.1 < np.abs(near - exact).max() * 255 < 1.2
