"""What the checks of tokenizers share."""

from typing import Any

import jax
import numpy as np

from rear_jax import tokenizers
from rear_jax.weights.layout import Layout, from_torch, to_torch


def tensors_of(golden) -> dict[str, np.ndarray]:
    """The authors' state dict, float32."""
    return {k.removeprefix("param/"): golden[k].astype(np.float32) for k in golden if k.startswith("param/")}


def compare(tokenizer, layout: Layout, golden, *, symmetric: bool) -> Any:
    """Latents, codes, decoded images, and the weights on their way in and out.

    Args:
      tokenizer: of the golden's sizes.
      layout: of its published files.
      golden: the arrays.
      symmetric: whether the golden's images are in [-1, 1] instead of the interface's [0, 1].

    Returns:
      The parameters.

    Raises:
      AssertionError: this project's numbers are not the golden's.
    """
    tensors, tokenizer = tensors_of(golden), tokenizer.clone(precision="highest")  # a GPU's TF32 is not so close
    images = (golden["in/images"] + 1) / 2 if symmetric else golden["in/images"]
    params = from_torch(tensors, tokenizers.shapes(tokenizer), layout.torch_name, ignore=layout.ignore)

    def run(method, x):
        return jax.jit(lambda x: tokenizer.apply({"params": params}, x, method=method))(x)

    decoded = run(tokenizer.decode, golden["out/tokens"])
    np.testing.assert_allclose(run(tokenizer.latents, images), golden["out/latents"], rtol=0, atol=2e-4)
    np.testing.assert_array_equal(run(tokenizer.encode, images), golden["out/tokens"])
    np.testing.assert_allclose(2 * decoded - 1 if symmetric else decoded, golden["out/decoded"], rtol=0, atol=2e-4)

    written = to_torch(params, layout.torch_name)
    spare = tensors.keys() - written.keys()
    assert written.keys() <= tensors.keys()
    assert all(key.startswith(layout.ignore) for key in spare), spare
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)
    return params
