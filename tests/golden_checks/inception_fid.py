"""FID's Inception-v3 as torch-fidelity has it, on weights drawn by the recipe in `meta`; images of several sizes."""

import json
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from rear_jax.metrics.inception import InceptionV3, params_from, resize

OUTPUTS = {"64": "first", "192": "second", "768": "middle", "2048": "pooled", "logits_unbiased": "logits"}


def weights(seed: int, order: Iterable[tuple[str, list[int]]]) -> dict[str, np.ndarray]:
    """A state dict under the port's keys, as the golden's recipe draws it."""
    random = np.random.RandomState(seed)
    draw, tensors = random.standard_normal, {}
    for key, shape in order:
        if len(shape) == 4:
            value = draw(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            value = draw(shape) * np.sqrt(1 / shape[1])
        elif key.endswith("running_var"):
            value = 0.5 + random.rand(*shape)
        elif key.endswith("running_mean"):
            value = 0.1 * draw(shape)
        elif key.endswith("bn.weight"):
            value = 0.8 + 0.4 * random.rand(*shape)
        else:
            value = 0.1 * draw(shape)
        tensors[key] = np.float32(value)
    return tensors


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    params = params_from(weights(meta["seed"], meta["order"]))

    @jax.jit
    def run(params, image):
        return InceptionV3().apply({"params": params}, image)

    for key in [key for key in golden if key.startswith("in/images_")]:
        number = key.removeprefix("in/images_")
        found = [run(params, resize(image[None])) for image in golden[key]]  # one by one: one compilation for all
        for name in meta["features"]:
            want = golden[f"out/{name}_{number}"]
            got = np.concatenate([np.asarray(getattr(outputs, OUTPUTS[name])) for outputs in found])
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * want.std(), err_msg=f"{name} of {key}")
