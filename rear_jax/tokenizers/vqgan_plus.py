"""VQGAN+: MaskGIT-VQGAN with learned downsampling and a narrower codebook (MaskBit, arXiv 2409.16211).

The published network (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 4096 codes of width 64) has 55.0M
parameters and turns 256×256 pixels into 16×16 codes. Images come in and go out in its own range, [0, 1].
"""

import functools
import re
from typing import ClassVar

from rear_jax.tokenizers import grid, maskgit_vqgan
from rear_jax.tokenizers.family import PARAMETERS, TokenizerFamily
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout, Path, TorchName


class VQGANPlus(maskgit_vqgan.MaskGitVQGAN):
    """The tokenizer: MaskGIT-VQGAN's attributes and methods."""

    strided: ClassVar[bool] = True
    coarse_first: ClassVar[bool] = True
    torch_init: ClassVar[bool] = True
    z_channels: int = 64
    codebook_size: int = 4096


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `VQGANPlus` lies in the file."""
    name = grid.torch_name(path)
    return name._replace(key=re.sub(r"\.(block|mid)\.(\d+)\.", _residual_block, name.key))


def _residual_block(match: re.Match) -> str:
    """`.block.0.` is `.res_blocks.0.` in the file, and `.mid.0.` is `.mid.res_blocks.0.`."""
    place, index = match.groups()
    return f".mid.res_blocks.{index}." if place == "mid" else f".res_blocks.{index}."


sizes = functools.partial(  # MaskBit's own tokenizers, which have no codebook, lack what this reads
    maskgit_vqgan.sizes,
    level="encoder.down.{}.res_blocks.0.conv1.weight",
    middle="encoder.mid.res_blocks.{}.conv1.weight",
)

FAMILY = TokenizerFamily(
    name="vqgan_plus",
    network=VQGANPlus,
    layout=Layout(r"encoder\.down\.0\.res_blocks\.0\.conv1\.weight", torch_name, sizes),
    parameters=PARAMETERS,
    to_8_bit=truncate,
    extent=("channel_mult",),
    published={((1, 1, 2, 2, 4),): ("VQGAN+", 55.0)},
)
