"""CLIP of either publisher: features of images and of texts, and the way of the weights from the file and back."""

import json
from collections.abc import Mapping

import jax
import numpy as np

from rear_jax.metrics import clip_files
from rear_jax.weights.layout import Layout, to_torch


def check(golden: Mapping[str, np.ndarray], layout: Layout, activation: str) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    tensors = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    assert clip_files.layout_of(tensors, "the golden") is layout
    heads = {"vision_heads": meta["vision"]["num_heads"], "text_heads": meta["text"]["num_heads"]}
    network = clip_files.make(clip_files.sizes_of(tensors), **heads, activation=activation)
    params = clip_files.params_from(tensors, network)

    @jax.jit
    def run(params, pixels, ids):
        features = (
            network.apply({"params": {tower: params[tower]}}, given, method=f"{tower}_features")
            for tower, given in (("image", pixels), ("text", ids))
        )
        return *features, network.apply({"params": params}, pixels, ids)

    images, texts, cosine = run(params, golden["in/pixels"], golden["in/input_ids"])
    np.testing.assert_allclose(images, golden["out/image_features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(texts, golden["out/text_features"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(cosine, golden["out/cosine"], atol=1e-6, rtol=0)
    scale = np.exp(np.float32(tensors["logit_scale"]))
    np.testing.assert_allclose(scale * cosine, golden["out/logits"], atol=2e-5, rtol=0)

    fused = clip_files.FusedTensors(tensors) if layout is clip_files.HUGGING_FACE else tensors
    written = to_torch(params, layout.torch_name)
    assert written.keys() == fused.keys() - {"logit_scale"}
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, fused[key], err_msg=key)
