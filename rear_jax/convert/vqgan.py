"""What the published files of the VQGAN family have in common: flat PyTorch state dicts with parallel names."""

import re
from collections.abc import Mapping

import numpy as np

from rear_jax.convert.layout import CONV, Path, TorchName
from rear_jax.errors import RearError


def torch_name(path: Path) -> TorchName:
    """Where a tokenizer's parameter lies in a file that names every module as the tokenizer does, `m.0` for `m_0`."""
    if path == ("codebook",):
        return TorchName("quantize.embedding.weight")
    *modules, leaf = path
    prefix = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    return {
        "kernel": TorchName(f"{prefix}.weight", CONV),
        "scale": TorchName(f"{prefix}.weight"),
        "bias": TorchName(f"{prefix}.bias"),
    }[leaf]


def numbered(tensors: Mapping[str, np.ndarray], template: str) -> list[np.ndarray]:
    """The tensors whose keys are the template with 0, 1, 2, ... for its `{}`, as far as they go.

    Raises:
      KeyError: there is not even the first.
    """
    found = [tensors[template.format(0)]]
    while (key := template.format(len(found))) in tensors:
        found.append(tensors[key])
    return found


def foreign_file(source: str, missing: KeyError, network: str) -> RearError:
    """The error for a file without a tensor that every file of the network has."""
    return RearError(
        f"{source} has no tensor {missing}: it is not a {network} checkpoint. "
        "Give such a file, or the config of the network that this one holds."
    )
