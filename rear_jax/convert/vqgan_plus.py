"""The published VQGAN+ files of MaskBit: flat PyTorch state dicts (`vqgan_plus_12bit.bin`; arXiv 2409.16211)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert import vqgan
from rear_jax.convert.layout import Path, TorchName

SIGNATURE = r"encoder\.down\.0\.res_blocks\.0\.conv1\.weight"
IGNORE = ()


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `VQGANPlus` lies in the file."""
    name = vqgan.torch_name(path)
    return name._replace(key=re.sub(r"\.(block|mid)\.(\d+)\.", _residual_block, name.key))


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `VQGANPlus` that a file determines: all but image_size, l2_normalize and dtype.

    Raises:
      RearError: the file is not a VQGAN+ state dict; MaskBit's own tokenizers, which have no codebook, are not either.
    """
    try:
        hidden_channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = vqgan.numbered(tensors, "encoder.down.{}.res_blocks.0.conv1.weight")
        middle = vqgan.numbered(tensors, "encoder.mid.res_blocks.{}.conv1.weight")
        codebook_size, z_channels = tensors["quantize.embedding.weight"].shape
    except KeyError as missing:
        raise vqgan.foreign_file(source, missing, "VQGAN+") from missing
    return {
        "hidden_channels": hidden_channels,
        "channel_mult": tuple(kernel.shape[0] // hidden_channels for kernel in levels),
        "num_res_blocks": len(middle),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
    }


def _residual_block(match: re.Match) -> str:
    """`.block.0.` is `.res_blocks.0.` in the file, and `.mid.0.` is `.mid.res_blocks.0.`."""
    place, index = match.groups()
    return f".mid.res_blocks.{index}." if place == "mid" else f".res_blocks.{index}."
