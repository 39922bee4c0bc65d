"""Janus-Pro's image tower, aligner, pixels and greedy answers, as the package transformers has them."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rear_jax.generators.janus import preprocess, understanding_files
from rear_jax.generators.janus.understanding import Answering, Understanding, answer
from rear_jax.weights.layout import to_torch


def loaded(golden: Mapping[str, np.ndarray]) -> tuple[Understanding, Any]:
    """The network of a golden and its parameters."""
    meta = json.loads(str(golden["meta"]))
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    found = understanding_files.sizes(tensors)
    heads = {"heads": meta["num_heads"], "vision_heads": meta["vision_heads"]}  # smaller ones than in published files
    module = Understanding(**found | heads, placeholder_id=meta["image_id"], dtype=np.dtype("float32"))
    params = understanding_files.params_from(tensors, module)
    written = to_torch(params, understanding_files.torch_name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
    return module, params


LEVEL = 2 / 255  # of 8 bits, in [-1, 1]: versions of Pillow round apart


def pixels_of(golden: Mapping[str, np.ndarray], numbers: range) -> np.ndarray:
    """Some of its images as this project prepares them."""
    size = json.loads(str(golden["meta"]))["image_size"]
    return preprocess.normalised(np.stack([preprocess.on_a_square(golden[f"in/image_{n}"], size) for n in numbers]))


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    module, params = loaded(golden)
    sizes = {
        "vocabulary_size": meta["vocab_size"],
        "width": meta["width"],
        "depth": meta["num_layers"],
        "mlp_width": meta["mlp_size"],
        "vision_width": meta["vision_width"],
        "vision_depth": meta["vision_layers"],
        "image_size": meta["image_size"],
        "patch_size": meta["patch_size"],
    }
    assert {name: getattr(module, name) for name in sizes} == sizes
    count = sum(key.startswith("in/image_") for key in golden)
    pixels = pixels_of(golden, range(count))
    for number, found in enumerate(pixels):
        wanted = golden[f"out/pixels_{number}"]
        np.testing.assert_allclose(found, wanted, atol=LEVEL + 1e-6, rtol=0, err_msg=str(number))

    ids, mask = golden["in/ids"], golden["in/mask"]
    shown = np.stack([golden[f"out/pixels_{number}"] for number in range(len(ids))])
    wanted = golden["out/answer_ids"]
    tower = jax.jit(lambda params, x: module.apply({"params": params}, x, method=lambda model, x: model.tower(x)))
    np.testing.assert_allclose(tower(params, shown), golden["out/tower"], atol=2e-4, rtol=0)
    aligned = jax.jit(lambda params, x: module.apply({"params": params}, x, method="see"))
    np.testing.assert_allclose(aligned(params, shown), golden["out/aligned"], atol=2e-4, rtol=0)

    keys = jax.random.split(jax.random.key(0), len(ids))
    settings = Answering(meta["end_id"], wanted.shape[1])
    said, logits = jax.jit(lambda *given: answer(module, *given, keys, settings, return_logits=True))(
        params, shown, ids, mask
    )
    np.testing.assert_array_equal(said, wanted)
    np.testing.assert_allclose(logits, golden["out/answer_logits"], atol=2e-4, rtol=0)
