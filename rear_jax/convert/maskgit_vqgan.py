"""The published MaskGIT-VQGAN file: a flat PyTorch state dict (`tokenizer_maskgit_vqgan.bin` and its copies)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert.layout import CONV, Path, TorchName
from rear_jax.errors import RearError

SIGNATURE = r"encoder\.down\.0\.block\.0\.conv1\.weight"
IGNORE = ()


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `MaskGitVQGAN` lies in the file."""
    if path == ("codebook",):
        return TorchName("quantize.embedding.weight")
    *modules, leaf = path
    prefix = ".".join(re.sub(r"_(\d+)$", r".\1", module) for module in modules)
    return {
        "kernel": TorchName(f"{prefix}.weight", CONV),
        "scale": TorchName(f"{prefix}.weight"),
        "bias": TorchName(f"{prefix}.bias"),
    }[leaf]


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `MaskGitVQGAN` that a file determines: all but image_size, l2_normalize and dtype.

    Raises:
      RearError: the file is not a MaskGIT-VQGAN state dict.
    """
    try:
        hidden_channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = _count(tensors, r"encoder\.down\.(\d+)\.")
        widths = [tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        codebook_size, z_channels = tensors["quantize.embedding.weight"].shape
    except KeyError as error:
        raise RearError(f"{source} has no tensor {error}: it is not a MaskGIT-VQGAN checkpoint") from error
    return {
        "hidden_channels": hidden_channels,
        "channel_mult": tuple(width // hidden_channels for width in widths),
        "num_res_blocks": _count(tensors, r"encoder\.mid\.(\d+)\."),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
    }


def _count(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    """How many different indices the pattern's group takes among the keys."""
    return len({match[1] for match in map(re.compile(pattern).match, tensors) if match})
