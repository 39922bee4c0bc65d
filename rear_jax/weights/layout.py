"""Flax parameter trees from flat PyTorch state dicts, and back.

A network describes its published layout by one function, `torch_name(path) -> TorchName`, from the path of a Flax
parameter to the key and the axis order of the same tensor in the authors' file. Everything else (reading, writing,
naming what is missing, unexpected or mis-shaped) happens here, once for all networks.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
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
      parts: of a parameter that lies in several tensors of one size: what a `{part}` in the key stands for in each.
        They lie side by side along the last axis of the parameter.
    """

    key: str
    axes: tuple[int, ...] | None = None
    parts: tuple[str, ...] = ()


class OpenTensors(Mapping[str, np.ndarray]):
    """The tensors of an open file, each read when it is asked for."""

    @abc.abstractmethod
    def outline(self) -> dict[str, np.ndarray]:
        """A `stand_in` for each tensor, from the header of the file."""


class Hub(NamedTuple):
    """How model hubs hand out a network: a folder with a `config.json` beside the weights.

    Attributes:
      sizes: (that JSON, its path) -> settings of the network that it gives beyond what the weights determine.
      config: (the network's config section, pixels of an image) -> that JSON.
      check: (section) raises RearError where such a network has no published form.
    """

    sizes: Callable[..., dict[str, Any]]
    config: Callable[[Mapping[str, Any], int], dict[str, Any]]
    check: Callable[[Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The published file format of a network.

    Attributes:
      signature: regular expression of a key that the files of no other network have.
      torch_name: where each parameter lies.
      sizes: (tensors) -> the settings of the network's config section that a file determines; a KeyError where the file
        lacks what they are read from.
      ignore: prefixes of keys that carry nothing for the network.
      under: key under which the authors' code looks for the state dict in a pickled file; '' = the file is one.
      optional: modules that a file may lack and a network may have no use for -> the prefix of their keys.
      hub: of the network's folders on model hubs, None where there are none.
      within: how other files hold the network: prefix of its keys there -> (such a key) -> the key in this layout, or
        None where there is none.
      part: whether the authors' files hold other networks as well, which their code needs.
    """

    signature: str
    torch_name: Callable[[Path], TorchName]
    sizes: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    ignore: tuple[str, ...] = ()
    under: str = ""
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hub: Hub | None = None
    within: Mapping[str, Callable[[str], str | None]] = dataclasses.field(default_factory=dict)
    part: bool = False


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT8 = {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)}
_VALUES_AT_ONCE = 1 << 20  # that are searched for NaN
LINEAR = (1, 0)  # PyTorch [out, in] -> Flax [in, out]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")  # tensors of PyTorch's layer
CONV = (2, 3, 1, 0)  # PyTorch [out, in, kh, kw] -> Flax [kh, kw, in, out]


def leaf_name(prefix: str, leaf: str) -> TorchName:
    """Of a linear layer or a norm: `kernel` is a transposed weight, `scale` a weight, `bias` itself."""
    if leaf == "kernel":
        return TorchName(f"{prefix}.weight", LINEAR)
    return TorchName(f"{prefix}.{'weight' if leaf == 'scale' else 'bias'}")


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

    Raises RearError: keys are missing or unexpected, or a tensor has another shape or no floats; all of them are named.
      Or a tensor has a value that is NaN or infinite.
    """
    require_fit(outline(tensors), shapes, torch_name, ignore=ignore, source=source)
    flat: dict[Path, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name = torch_name(path)
        flat[path] = value = _empty(leaf.shape, leaf.dtype)
        for key, target in _tensors(name, value):
            with np.errstate(over="ignore"):  # what float64 has beyond float32 is found as infinite
                target[...] = _in_flax_order(tensors[key], name)
            require_finite(target, key, source)
    return traverse_util.unflatten_dict(flat)


def require_fit(
    tensors: Mapping[str, np.ndarray],
    shapes: Any,
    torch_name: Callable[[Path], TorchName],
    *,
    ignore: tuple[str, ...] = (),
    source: str = "the state dict",
) -> None:
    """Raises RearError unless `from_torch` can build the parameters; arguments as there, no value is looked at."""
    used: set[str] = set()
    missing: list[str] = []
    misshaped: list[str] = []
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name = torch_name(path)
        wanted = {key: part.shape for key, part in _tensors(name, stand_in(leaf.shape))}
        used.update(wanted)
        missing += [key for key in wanted if key not in tensors]
        found = {key: _in_flax_order(tensors[key], name).shape for key in wanted if key in tensors}
        misshaped += [f"{key} {shape}, wanted {wanted[key]}" for key, shape in found.items() if shape != wanted[key]]
    unexpected = sorted(k for k in tensors if k not in used and not k.startswith(ignore))
    types = {key: tensors[key].dtype for key in sorted(used) if key in tensors}
    if eight := next((key for key, dtype in types.items() if dtype in _FLOAT8), ""):
        raise RearError(f"{source}: {eight} is {types[eight]}, which cannot be read here: save the file as bfloat16.")
    no_floats = [f"{key} {dtype}" for key, dtype in types.items() if not is_float(dtype)]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped, "of no floats": no_floats}
    if any(problems.values()):
        told = "; ".join(f"{len(v)} {what}: {', '.join(k[:99] for k in v[:8])}" for what, v in problems.items() if v)
        raise RearError(f"{source} does not fit this network: {told}. Check that the config's sizes are the file's.")


def is_float(dtype: np.dtype) -> bool:
    """Whether a network's weights can be of this dtype."""
    return np.issubdtype(dtype, np.floating) or dtype == _BFLOAT16 or dtype in _FLOAT8


def require_finite(value: np.ndarray, key: str, source: str) -> None:
    """Raises RearError where a tensor has a value that is NaN or infinite; part after part, to save memory."""
    flags = ("external_loop", "buffered", "zerosize_ok")
    if not all(np.isfinite(part).all() for part in np.nditer(value, flags, order="K", buffersize=_VALUES_AT_ONCE)):
        raise RearError(f"{source}: {key} is not finite (NaN or infinite); fetch the file again.")


def outline(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The same keys with tensors of the same shapes and dtypes; of an open file stand-ins, and nothing is read."""
    return tensors.outline() if isinstance(tensors, OpenTensors) else tensors


def stand_in(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Zeros of a shape that take no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def joined(parts: Sequence[np.ndarray], what: str) -> np.ndarray:
    """A stand-in for what tensors are one after the other; RearError where they do not fit together."""
    if not all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts):
        raise RearError(f"The queries, keys and values of {what} have shapes that do not fit: fetch the file again.")
    odd = next((part.dtype for part in parts if not is_float(part.dtype)), parts[0].dtype)
    return stand_in((sum(len(part) for part in parts), *parts[0].shape[1:]), odd)


def _in_flax_order(tensor: np.ndarray, name: TorchName) -> np.ndarray:
    """The tensor with its axes as Flax has them, where it has as many."""
    return tensor.transpose(name.axes) if name.axes is not None and tensor.ndim == len(name.axes) else tensor


def to_torch(params: Any, torch_name: Callable[[Path], TorchName]) -> dict[str, np.ndarray]:
    """Writes Flax parameters as a flat PyTorch state dict: the inverse of `from_torch`."""
    return {key: np.ascontiguousarray(tensor) for key, tensor in torch_tensors(params, torch_name)}


def torch_tensors(params: Any, torch_name: Callable[[Path], TorchName]) -> Iterator[tuple[str, np.ndarray]]:
    """Keys and tensors of `to_torch` one by one, as views of the parameters where these are on the host."""
    for path, leaf in traverse_util.flatten_dict(params).items():
        name = torch_name(path)
        for key, part in _tensors(name, np.asarray(leaf)):
            yield key, part if name.axes is None else part.transpose(np.argsort(name.axes))


def torch_shapes(params: Any, torch_name: Callable[[Path], TorchName]) -> dict[str, np.ndarray]:
    """Keys of `to_torch` with stand-ins that have shape and dtype of the tensors but take no memory."""
    empty = {
        path: np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)
        for path, leaf in traverse_util.flatten_dict(params).items()
    }
    return dict(torch_tensors(traverse_util.unflatten_dict(empty), torch_name))


def count_layers(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many different indices the group of a regular expression takes among the keys that it matches."""
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that begins at a multiple of 64 bytes: JAX on a CPU takes such an array without copying it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _tensors(name: TorchName, value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The state-dict keys of one Flax parameter, each with the view that lies there: one per layer and part."""
    for i, layer in enumerate(value if "{i}" in name.key else value[None]):
        key = name.key.replace("{i}", str(i))
        if name.parts:
            views = np.split(layer, len(name.parts), axis=-1)
            yield from zip((key.replace("{part}", part) for part in name.parts), views, strict=True)
        else:
            yield key, layer
