"""The weights of FID's Inception-v3, out of the PyTorch port of the 2015 graph (`pt_inception-2015-12-05`)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.convert.layout import CONV, LINEAR, Path, TorchName, from_torch
from rear_jax.convert.torch_files import read_tensors
from rear_jax.errors import RearError
from rear_jax.metrics.inception import SIZE, InceptionV3

BATCH_NORM_EPSILON = 1e-3
UNUSED = ("fc.bias",)  # the Inception Score is taken of logits without it
COUNTER = ".bn.num_batches_tracked"  # that PyTorch writes beside each BatchNorm since version 0.4.1


def load(path: str) -> Any:
    """The parameters of `InceptionV3` from the published file.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth`, or any state dict with its keys.

    Returns:
      float32 numpy.

    Raises:
      RearError: the file is missing, damaged or of another network.
    """
    return params_from(read_tensors(path), source=path)


def params_from(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> Any:
    """The parameters of `InceptionV3`, BatchNorm folded in.

    Raises:
      RearError: a tensor is missing, unexpected or of another shape, or not finite.
    """
    folded = fold_batch_norm(tensors, source=source)
    params = from_torch(folded, parameter_shapes(), torch_name, ignore=UNUSED, source=source)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise RearError(f"{source} has weights that are NaN or infinite; fetch the file again.")
    return params


@functools.cache
def parameter_shapes() -> Any:
    """Of `InceptionV3`."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), images)["params"]


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` lies in a folded state dict: the modules have the port's names."""
    *modules, leaf = path
    where = ".".join(modules)
    if leaf == "bias":
        return TorchName(f"{where}.bias")
    return TorchName(f"{where}.weight", LINEAR if where == "fc" else CONV)


def fold_batch_norm(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, np.ndarray]:
    """Turns each pair `X.conv`, `X.bn` into a convolution `X.conv` with bias.

    With BatchNorm y = γ·(x − μ)/√(σ² + ε) + β, the folded weight is w·γ/√(σ² + ε) and the bias β − μ·γ/√(σ² + ε),
    computed in float64. What belongs to no such pair is passed on.

    Raises:
      RearError: a BatchNorm lacks a tensor, or one of its tensors has another length.
    """
    folded = {key: value for key, value in tensors.items() if ".bn." not in key}
    unknown = {key for key in tensors if ".bn." in key and not key.endswith(COUNTER)}
    for key in [key for key in folded if key.endswith(".conv.weight")]:
        layer, weight = key.removesuffix(".conv.weight"), tensors[key]
        norm = {}
        for part in ("weight", "bias", "running_mean", "running_var"):
            name = f"{layer}.bn.{part}"
            if name not in tensors or tensors[name].shape != weight.shape[:1]:
                raise RearError(f"{source} is not FID's Inception: no {name} of {len(weight)} values.")
            norm[part] = tensors[name].astype(np.float64)
            unknown.discard(name)
        scale = norm["weight"] / np.sqrt(norm["running_var"] + BATCH_NORM_EPSILON)
        folded[key] = (weight * scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        folded[f"{layer}.conv.bias"] = (norm["bias"] - norm["running_mean"] * scale).astype(np.float32)
    return folded | {key: tensors[key] for key in unknown}  # for the message about unexpected keys
