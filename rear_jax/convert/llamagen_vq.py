"""LlamaGen's published tokenizers: a PyTorch state dict under "model" (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`, ...)."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert import vqgan
from rear_jax.convert.layout import Path, TorchName

SIGNATURE = r"encoder\.conv_blocks\.0\.res\.0\.conv1\.weight"
IGNORE = ("quantize.codebook_used",)  # the last codes seen in training, for a usage statistic


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `LlamaGenVQ` lies in the file."""
    if "quant_conv" in path or "post_quant_conv" in path:  # parts of neither network there
        path = path[1:]
    if "downsample" in path or "upsample" in path:
        path = (*path[:-1], "conv", path[-1])
    return vqgan.torch_name(path)


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `LlamaGenVQ` that a file determines: all but image_size, l2_normalize and dtype.

    Raises:
      RearError: the file is not a state dict of this tokenizer.
    """
    try:
        channels = tensors["encoder.conv_in.weight"].shape[0]
        levels = vqgan.numbered(tensors, "encoder.conv_blocks.{}.res.0.conv1.weight")
        blocks = vqgan.numbered(tensors, "encoder.conv_blocks.0.res.{}.conv1.weight")
        z_channels = tensors["encoder.conv_out.weight"].shape[0]
        codebook_size, codebook_dim = tensors["quantize.embedding.weight"].shape
    except KeyError as missing:
        raise vqgan.foreign_file(source, missing, "LlamaGen VQ") from missing
    return {
        "channels": channels,
        "channel_mult": tuple(kernel.shape[0] // channels for kernel in levels),
        "num_res_blocks": len(blocks),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }
