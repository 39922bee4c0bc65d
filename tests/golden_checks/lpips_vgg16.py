"""LPIPS-VGG of the authors' package, on weights drawn by the recipe in `meta`."""

import json
from collections.abc import Mapping

import jax
import numpy as np

from rear_jax.metrics.lpips import LPIPS, STAGES, params_from, torch_name
from rear_jax.weights.layout import to_torch


def weights(seed: int) -> dict[str, np.ndarray]:
    """VGG16 under torchvision's keys and the heads under the lpips package's, as the golden's recipe draws them."""
    draw = np.random.RandomState(seed).standard_normal
    tensors, index, inputs = {}, 0, 3
    for widths in STAGES:
        for width in widths:
            shape = (width, inputs, 3, 3)
            tensors[f"features.{index}.weight"] = np.float32(draw(shape) * np.sqrt(2 / (inputs * 9)))
            tensors[f"features.{index}.bias"] = np.float32(0.1 * draw(width))
            index, inputs = index + 2, width  # a ReLU stands between
        index += 1  # a pool
    for stage, widths in enumerate(STAGES):
        tensors[f"lin{stage}.model.1.weight"] = np.float32(np.abs(draw((1, widths[-1], 1, 1))) * 0.1)
    return tensors


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    tensors = weights(meta["seed"])
    params = params_from(tensors)
    low, high = meta["image_range"]
    a, b = ((golden[f"in/{name}"] - low) / (high - low) for name in "ab")

    @jax.jit
    def run(params, a, b):
        network = LPIPS()
        found = [network.apply({"params": params}, x, method="features") for x in (a, b)]
        layers = network.apply({"params": params}, *found, method="layer_distances")
        return network.apply({"params": params}, *found, method="distance"), layers

    distance, layers = run(params, a, b)
    np.testing.assert_allclose(layers, golden["out/per_layer"], rtol=1e-5)
    np.testing.assert_allclose(distance, golden["out/distance"], rtol=1e-5)

    written = to_torch(params, torch_name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
