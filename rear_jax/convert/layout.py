"""Flax parameter trees from flat PyTorch state dicts, and back.

A network describes its published layout by one function, `torch_name(path) -> TorchName`, from the path of a Flax
parameter to the key and the axis order of the same tensor in the authors' file. Everything else (reading, writing,
naming what is missing, unexpected or mis-shaped) happens here, once for all networks.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from rear_jax.errors import RearError

Path = tuple[str, ...]


class TorchName(NamedTuple):
    """Where a Flax parameter lives in a PyTorch state dict.

    Attributes:
      key: state-dict key; a `{i}` in it stands for the layer index of a parameter that Flax keeps stacked as [L, ...].
      axes: the permutation that takes the PyTorch tensor's axes to Flax order (per layer, without the L axis);
        None leaves them as they are.
    """

    key: str
    axes: tuple[int, ...] | None = None


LINEAR = (1, 0)  # PyTorch [out, in] -> Flax [in, out]
CONV = (2, 3, 1, 0)  # PyTorch [out, in, kh, kw] -> Flax [kh, kw, in, out]


def from_torch(
    tensors: Mapping[str, np.ndarray],
    shapes: Any,
    torch_name: Callable[[Path], TorchName],
    *,
    ignore: tuple[str, ...] = (),
    source: str = "the state dict",
) -> Any:
    """Builds the Flax parameters that `shapes` describes from a flat PyTorch state dict.

    Args:
      tensors: state-dict key -> array; any float dtype.
      shapes: nested dict of arrays or `jax.ShapeDtypeStruct`, as `jax.eval_shape(module.init, ...)['params']` gives.
      torch_name: the network's layout.
      ignore: prefixes of keys in the file that carry nothing for this network.
      source: how an error message calls the file.

    Returns:
      A nested dict of numpy arrays with the shapes and dtypes of `shapes`.

    Raises:
      RearError: keys are missing or unexpected, or a tensor has another shape; all of them are named.
    """
    flat_shapes = traverse_util.flatten_dict(shapes)
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    flat: dict[Path, np.ndarray] = {}
    for path, leaf in flat_shapes.items():
        name = torch_name(path)
        keys = _keys(name, leaf.shape)
        used.update(keys)
        absent = [key for key in keys if key not in tensors]
        missing.extend(absent)
        if absent:
            continue
        layers = [np.asarray(tensors[key]) for key in keys]
        if name.axes is not None and all(layer.ndim == len(name.axes) for layer in layers):
            layers = [layer.transpose(name.axes) for layer in layers]
        stacked = "{i}" in name.key
        want = leaf.shape[1:] if stacked else leaf.shape
        wrong = [f"{k} {a.shape}, wanted {want}" for k, a in zip(keys, layers, strict=True) if a.shape != want]
        misshaped.extend(wrong)
        if not wrong:
            value = np.stack(layers) if stacked else layers[0]
            flat[path] = np.ascontiguousarray(value, dtype=leaf.dtype)
    unexpected = sorted(k for k in tensors if k not in used and not k.startswith(ignore))
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(problems.values()):
        told = "; ".join(f"{len(v)} {what}: {', '.join(v[:8])}" for what, v in problems.items() if v)
        raise RearError(f"{source} does not fit this network: {told}. Check that the config's sizes are the file's.")
    return traverse_util.unflatten_dict(flat)


def to_torch(params: Any, torch_name: Callable[[Path], TorchName]) -> dict[str, np.ndarray]:
    """Writes Flax parameters as a flat PyTorch state dict: the inverse of `from_torch`."""
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(jax.device_get(params)).items():
        name = torch_name(path)
        layers = leaf if "{i}" in name.key else leaf[None]
        for key, layer in zip(_keys(name, leaf.shape), layers, strict=True):
            value = layer if name.axes is None else layer.transpose(np.argsort(name.axes))
            tensors[key] = np.ascontiguousarray(value)
    return tensors


def _keys(name: TorchName, shape: tuple[int, ...]) -> list[str]:
    """The state-dict keys of one Flax parameter: one, or one per layer of a stacked parameter."""
    return [name.key.replace("{i}", str(i)) for i in range(shape[0])] if "{i}" in name.key else [name.key]
