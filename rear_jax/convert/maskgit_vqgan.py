"""The published MaskGIT-VQGAN file: a flat PyTorch state dict (`tokenizer_maskgit_vqgan.bin` and its copies)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert import vqgan
from rear_jax.convert.layout import Path, TorchName

SIGNATURE = r"encoder\.down\.0\.block\.0\.conv1\.weight"
IGNORE = ()


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `MaskGitVQGAN` lies in the file."""
    return vqgan.torch_name(path)


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `MaskGitVQGAN` that a file determines: all but image_size, l2_normalize and dtype.

    Raises:
      RearError: the file is not a MaskGIT-VQGAN state dict.
    """
    try:
        hidden_channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = vqgan.numbered(tensors, "encoder.down.{}.block.0.conv1.weight")
        middle = vqgan.numbered(tensors, "encoder.mid.{}.conv1.weight")
        codebook_size, z_channels = tensors["quantize.embedding.weight"].shape
    except KeyError as missing:
        raise vqgan.foreign_file(source, missing, "MaskGIT-VQGAN") from missing
    return {
        "hidden_channels": hidden_channels,
        "channel_mult": tuple(kernel.shape[0] // hidden_channels for kernel in levels),
        "num_res_blocks": len(middle),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
    }
