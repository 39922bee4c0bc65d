"""Crops against the published implementations' values and by their symmetries."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rear_jax.data.crops import AUGMENTATIONS, RANDOM_VIEWS, center_crop, random_crop_flip, ten_crop
from tests import toy
from tests.test_configs import load

GOLDEN = Path(__file__).parent / "goldens" / "center_crop.npz"


def ramp(height: int, width: int) -> np.ndarray:
    """An image [H, W, 3] whose pixel says where it is: (row, column, 7)."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 7)], axis=2).astype(np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def test_center_crop_is_adms():
    golden = np.load(GOLDEN)
    for index, size in enumerate(json.loads(str(golden["meta"]))["sizes"]):
        np.testing.assert_array_equal(center_crop(golden[f"in/image_{index}"], size), golden[f"out/crop_{index}"])


def test_center_crop_leaves_an_image_of_the_right_size_alone():
    image = noise(24, 24)
    assert center_crop(image, 24) is image


def test_center_crop_floors_the_margin():
    crop = center_crop(ramp(10, 15), 10)
    np.testing.assert_array_equal(crop[0, :, 1], np.arange(2, 12))


def test_ten_crop_order_and_rounding():
    # int(1.1 * 50) = 55, so the corners are 5 apart and the centre starts at round(2.5) = 2.
    views = ten_crop(ramp(55, 55), 50)
    starts = [tuple(int(x) for x in view[0, 0, :2]) for view in views]
    assert starts[:5] == [(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)]
    # Mirrored: the first pixel of a row is the last column of the window counted from the other side.
    assert starts[5:] == [(0, 54), (0, 49), (5, 54), (5, 49), (2, 52)]
    assert all(view.shape == (50, 50, 3) for view in views)


def test_ten_crop_resizes_to_a_rounded_down_short_side():
    # LlamaGen at 256 px crops from int(281.6) = 281 px.
    image = noise(300, 400)
    np.testing.assert_array_equal(ten_crop(image, 256)[3], center_crop(image, 281)[25:, 25:])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_counts(name: str):
    count, views = AUGMENTATIONS[name]
    made = views(noise(40, 50), 32)
    assert len(made) == count
    assert {view.shape for view in made} == {(32, 32, 3)}


def test_flip_is_the_center_crop_and_its_mirror():
    image = noise(40, 50)
    crop, mirrored = AUGMENTATIONS["flip"][1](image, 32)
    np.testing.assert_array_equal(crop, center_crop(image, 32))
    np.testing.assert_array_equal(mirrored, crop[:, ::-1])


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 48), view=st.sampled_from([*RANDOM_VIEWS])
)
def test_random_views_of_any_size(height: int, width: int, size: int, view: str):
    image = noise(height, width)
    made = RANDOM_VIEWS[view](image, size, np.random.default_rng(0))
    assert made.shape == (size, size, 3)
    assert made.dtype == np.uint8
    again = RANDOM_VIEWS[view](image, size, np.random.default_rng(0))
    np.testing.assert_array_equal(made, again)


@pytest.mark.parametrize(
    ("height", "width", "resized", "top", "left"), [(53, 31, (25, 15), 5, 0), (15, 100, (15, 100), 0, 42)]
)
def test_bicubic_is_torchvisions_resize_and_center_crop(height, width, resized, top, left):
    """One step though 31 is twice 15, 53 * 15 / 31 = 25.6 rounded down, and an offset of 42.5 rounded half to even."""
    image = noise(height, width)
    pixels = np.asarray(Image.fromarray(image).resize(resized[::-1], resample=Image.Resampling.BICUBIC))
    made = RANDOM_VIEWS["bicubic"](image, 15, np.random.default_rng(0))
    np.testing.assert_array_equal(made, pixels[top : top + 15, left : left + 15])
    assert (made != center_crop(image, 15)).any() == (height != 15)  # which halves the larger one first


def test_random_crop_flip_covers_scales_places_and_mirrors():
    image = ramp(200, 200)
    views = [random_crop_flip(image, 100, np.random.default_rng(seed)).astype(int) for seed in range(60)]
    mirrored = [view[50, 0, 1] > view[50, -1, 1] for view in views]
    assert 15 < sum(mirrored) < 45
    spans = {int(abs(view[50, -1, 1] - view[50, 0, 1])) for view in views}
    assert min(spans) < 185 < 195 < max(spans)  # from 1.1 times the size down to the size itself
    assert len({int(view[0, 0, 0]) for view in views}) > 5


@pytest.mark.parametrize(("name", "largest"), [("crop_flip", 1.1), ("wide_crop_flip", 1.25), ("window_flip", 1.0)])
def test_the_largest_short_side_of_each_recipe(name: str, largest: float):
    """How much of a square image is seen: all of it at a short side of 1, four fifths at 1.25."""
    image = ramp(200, 200)
    views = [RANDOM_VIEWS[name](image, 100, np.random.default_rng(seed)).astype(int) for seed in range(60)]
    spans = [int(abs(view[50, -1, 1] - view[50, 0, 1])) for view in views]
    assert max(spans) == pytest.approx(198, abs=2)
    assert min(spans) == pytest.approx(198 / largest, abs=3)


def test_published_tokenizers_are_trained_on_the_views_of_their_authors():
    wanted = {"tokenizer_llamagen_vq16": "wide_crop_flip", "tokenizer_llamagen_vq8": "wide_crop_flip"}
    wanted |= dict.fromkeys(("tokenizer_titok_b64", "tokenizer_titok_s128", "tokenizer_titok_l32"), "window_flip")
    for name, view in wanted.items():
        assert load(toy.ROOT / "configs" / f"{name}.py").tokenizer_training.augmentation == view
