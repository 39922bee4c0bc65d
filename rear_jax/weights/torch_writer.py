"""Writing parameters as `.bin` files that `torch.load` reads, without PyTorch, one tensor at a time.

The format is that of `torch.save` since PyTorch 1.6: an uncompressed zip archive with the pickle `archive/data.pkl`, in
which the tensors refer to their storages by number, and the elements of each in `archive/data/<number>`. The pickle
asks for classes of PyTorch by name, so that its opcodes are written here by hand; they are of protocol 2, and few
enough for `torch.load(weights_only=True)`.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rear_jax.runtime.atomic import atomic_file
from rear_jax.weights import layout
from rear_jax.weights.torch_files import STORAGE_DTYPES

_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}


def save(path: Path, params: Any, torch_name: Callable[[layout.Path], layout.TorchName], *, under: str = "") -> None:
    """Writes a Flax parameter tree as a state dict, under a temporary name until it is whole.

    Args:
      path: of the file.
      params: nested dict of arrays, on the host or on devices; fetched leaf by leaf.
      torch_name: the network's layout.
      under: key of the dict that holds the state dict; '' = the state dict is all there is.
    """
    tensors = (tensor for _, tensor in layout.torch_tensors(params, torch_name))
    write(path, layout.torch_shapes(params, torch_name), tensors, under=under)


def write(path: Path, outline: Mapping[str, np.ndarray], tensors: Iterable[np.ndarray], *, under: str = "") -> None:
    """Writes a state dict, under a temporary name until it is whole.

    Args:
      path: of the file.
      outline: its keys, with arrays or stand-ins that have shape and dtype of the tensors.
      tensors: in the same order; taken one by one.
      under: as of `save`.
    """
    content = _state_dict(outline)
    if under:
        content = _dict({under: content})
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _add(archive, "data.pkl", pickle.PROTO + b"\x02" + content + pickle.STOP)
        _add(archive, "version", b"3\n")
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors):
            _add(archive, f"data/{number}", np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def _add(archive: zipfile.ZipFile, name: str, content: bytes | np.ndarray) -> None:
    """Adds one member without compression and with a fixed date."""
    info = zipfile.ZipInfo(f"archive/{name}")
    info.file_size = len(content)  # beyond 2 GiB it takes other headers
    with archive.open(info, "w") as member:
        member.write(content)


def _state_dict(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Opcodes of a dict with the n-th of these tensors, contiguous, in storage n; only shapes and dtypes are read."""
    items = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        storage = _string("storage"), _name("torch", _STORAGES[tensor.dtype]), _string(str(number)), _string("cpu")
        stride = np.cumprod((1, *tensor.shape[:0:-1]))[: tensor.ndim][::-1]
        items[key] = (
            _name("torch._utils", "_rebuild_tensor_v2")
            + _tuple(
                _tuple(*storage, _integer(tensor.size)) + pickle.BINPERSID,
                _integer(0),
                _tuple(*map(_integer, tensor.shape)),
                _tuple(*map(_integer, stride)),
                pickle.NEWFALSE,  # requires_grad
                _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,  # hooks
            )
            + pickle.REDUCE
        )
    return _dict(items)


def _dict(items: Mapping[str, bytes]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(_string(k) + v for k, v in items.items()) + pickle.SETITEMS


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _integer(value: int) -> bytes:
    encoded = pickle.encode_long(int(value))
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
