"""The encoder of Hugging Face's T5 v1.1, and its features as LlamaGen takes them."""

import json
from collections.abc import Mapping

import jax
import numpy as np

from rear_jax.text import t5, t5_files
from rear_jax.text.encoder import right_aligned
from rear_jax.weights.layout import to_torch


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    tensors = {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}
    found = t5_files.sizes(tensors)
    assert found == {
        "vocabulary_size": meta["vocab_size"],
        "width": meta["width"],
        "depth": meta["num_layers"],
        "heads": meta["num_heads"],
        "head_size": meta["head_dim"],
        "mlp_width": meta["mlp_size"],
        "buckets": meta["relative_buckets"],
    }
    module = t5.T5Encoder(**found, max_distance=meta["relative_max_distance"], dtype=np.dtype("float32"))
    params = t5_files.params_from(tensors, module)
    written = to_torch(params, t5_files.torch_name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)

    ids, mask = golden["in/input_ids"], golden["in/mask"]
    buckets = t5.distance_buckets(ids.shape[1], meta["relative_buckets"], meta["relative_max_distance"])
    np.testing.assert_array_equal(buckets, golden["out/buckets"])
    hidden = jax.jit(module.apply)({"params": params}, ids, mask)
    np.testing.assert_allclose(hidden, golden["out/hidden"], atol=2e-4, rtol=0)
    features, moved = right_aligned(hidden, mask)
    np.testing.assert_allclose(features, golden["out/caption_features"], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(moved, golden["out/caption_mask"])
