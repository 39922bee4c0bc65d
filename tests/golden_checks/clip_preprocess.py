"""Preprocessing of CLIP and of HPSv2, the latter with and without antialiasing, of images of several shapes."""

import json
from collections.abc import Mapping

import numpy as np

from rear_jax.metrics.clip_preprocess import MEAN, STD, clip_pixels, clip_pixels_of_floats, hps_pixels

LEVEL = 1 / 255 / min(STD)  # one of 8 bits


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's pixels are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    size = meta["image_size"]
    assert (list(MEAN), list(STD)) == (meta["mean"], meta["std"])
    for key in [key for key in golden if key.startswith("in/image_")]:
        number, image = key.removeprefix("in/image_"), golden[key][None]
        floats = image / np.float32(255)
        np.testing.assert_allclose(clip_pixels(image, size)[0], golden[f"out/clip_{number}"], atol=1e-6, rtol=0)
        near = clip_pixels_of_floats(floats, size)[0]
        np.testing.assert_allclose(near, golden[f"out/clip_{number}"], atol=1.5 * LEVEL, rtol=0)
        for name, antialias in (("hps", True), ("hps_plain", False)):
            pixels = hps_pixels(floats, size, antialias=antialias)[0]
            np.testing.assert_allclose(pixels, golden[f"out/{name}_{number}"], atol=1e-5, rtol=0, err_msg=key)
