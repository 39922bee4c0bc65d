"""MaskGIT-VQGAN against the authors' network: latents, codes and decoded images, weights through the converter."""

import json
from collections.abc import Mapping

import jax
import numpy as np

from rear_jax import tokenizers
from rear_jax.tokenizers.maskgit_vqgan import FAMILY, MaskGitVQGAN
from rear_jax.weights.layout import from_torch, to_torch


def check(golden: Mapping[str, np.ndarray]) -> None:
    """Raises AssertionError where this project's numbers are not the golden's."""
    meta = json.loads(str(golden["meta"]))
    tensors = {
        key.removeprefix("param/"): np.asarray(golden[key], np.float32) for key in golden if key.startswith("param/")
    }
    found = FAMILY.layout.sizes(tensors)
    assert found["channel_mult"] == tuple(meta["channel_mult"])
    assert all(found[key] == meta[key] for key in ("hidden_channels", "num_res_blocks", "z_channels", "codebook_size"))

    tokenizer = MaskGitVQGAN(image_size=meta["resolution"], precision="highest", **found)
    images = golden["in/images"]
    params = from_torch(tensors, tokenizers.shapes(tokenizer), FAMILY.layout.torch_name)
    variables = {"params": params}
    latents = jax.jit(lambda x: tokenizer.apply(variables, x, method=tokenizer.latents))(images)
    codes = jax.jit(lambda x: tokenizer.apply(variables, x, method=tokenizer.encode))(images)
    decoded = jax.jit(lambda x: tokenizer.apply(variables, x, method=tokenizer.decode))(golden["out/tokens"])
    np.testing.assert_allclose(latents, golden["out/latents"], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(codes, golden["out/tokens"])
    np.testing.assert_allclose(decoded, golden["out/decoded"], rtol=0, atol=2e-4)

    written = to_torch(params, FAMILY.layout.torch_name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, err_msg=key)
