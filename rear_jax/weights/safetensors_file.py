"""Writing parameters as `.safetensors` with the authors' key names, one tensor at a time.

The package's own writer wants all tensors in memory, as bytes. The format (github.com/huggingface/safetensors): the
length of the header as a little-endian uint64, the header in JSON, then the tensors one after the other.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rear_jax.runtime.atomic import atomic_file
from rear_jax.weights import layout

DTYPES = {  # name of a dtype -> its code in the files
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    **{"bfloat16": "BF16", "bool": "BOOL"},
}


def save(path: Path, params: Any, torch_name: Callable[[layout.Path], layout.TorchName]) -> None:
    """Writes a Flax parameter tree as a flat state dict, under a temporary name until it is whole.

    Args:
      path: of the file.
      params: nested dict of arrays, on the host or on devices; fetched leaf by leaf.
      torch_name: the network's layout.
    """
    tensors = (tensor for _, tensor in layout.torch_tensors(params, torch_name))
    write(path, layout.torch_shapes(params, torch_name), tensors)


def write(path: Path, outline: Mapping[str, np.ndarray], tensors: Iterable[np.ndarray]) -> None:
    """Writes a state dict, under a temporary name until it is whole.

    Args:
      path: of the file.
      outline: its keys, with arrays or stand-ins that have shape and dtype of the tensors.
      tensors: in the same order; taken one by one.
    """
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for key, tensor in outline.items():
        end = position + tensor.size * tensor.dtype.itemsize
        header[key] = {"dtype": DTYPES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
