"""MaskGIT-VQGAN: a convolutional tokenizer without attention (MaskGIT, arXiv 2202.04200; VQGAN, arXiv 2012.09841).

The published network (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 1024 codes of width 256) has 54.5M
parameters and turns 256×256 pixels into 16×16 codes. Images come in and go out in its own range, [0, 1].
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from rear_jax.tokenizers import grid
from rear_jax.tokenizers.blocks import Decoder, Encoder
from rear_jax.tokenizers.family import PARAMETERS, TokenizerFamily
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout


class MaskGitVQGAN(grid.GridTokenizer):
    """The tokenizer; its interface is `base.CodebookTokenizer`.

    Attributes:
      strided: whether levels are halved by a convolution of stride 2 instead of a 2×2 mean.
      coarse_first: whether `decoder.up` begins with the smallest resolution, as its parameters are named.
      torch_init: whether convolutions start as in PyTorch, where VQGAN+ was trained, or as in Flax, where this one was.
      image_size: pixels along each side; a multiple of 2**(levels - 1).
      hidden_channels: width of the outermost level.
      channel_mult: width of each level in units of hidden_channels, outermost first; each further level halves the
        resolution.
      num_res_blocks: residual blocks in each level and in the middle.
      z_channels: width of latents and codes.
      codebook_size: number of codes.
      l2_normalize: compare and decode vectors of length one.
      dtype: of the convolutions; parameters, norms and distances are float32.
      precision: of products where dtype is float32, 'high' or 'highest', see `runtime.precision`.

    Raises RearError: the image size cannot be halved as often as the levels ask.
    """

    strided: ClassVar[bool] = False
    coarse_first: ClassVar[bool] = False
    torch_init: ClassVar[bool] = False
    image_size: int
    hidden_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 1024
    l2_normalize: bool = False
    dtype: Any = jnp.float32
    precision: str = "high"

    def setup(self) -> None:
        sizes = (self.hidden_channels, self.channel_mult, self.num_res_blocks)
        start = {"dtype": self.dtype, "torch_init": self.torch_init}
        self.encoder = Encoder(*sizes, self.z_channels, strided=self.strided, **start)
        self.decoder = Decoder(*sizes, coarse_first=self.coarse_first, **start)
        self.codebook = self.make_codebook()

    @property
    def embedding_dim(self) -> int:
        """D, the width of a codebook vector."""
        return self.z_channels


def sizes(
    tensors: Mapping[str, np.ndarray],
    *,
    level: str = "encoder.down.{}.block.0.conv1.weight",
    middle: str = "encoder.mid.{}.conv1.weight",
) -> dict[str, Any]:
    """The attributes of `MaskGitVQGAN` that a file determines: all but image_size, l2_normalize and dtype.

    Args:
      tensors: of the file.
      level, middle: keys of the first kernel of each level, and of each block in the middle.
    """
    hidden_channels = tensors["encoder.conv_in.weight"].shape[0]
    codebook_size, z_channels = tensors["quantize.embedding.weight"].shape
    return {
        "hidden_channels": hidden_channels,
        "channel_mult": tuple(kernel.shape[0] // hidden_channels for kernel in grid.numbered(tensors, level)),
        "num_res_blocks": len(grid.numbered(tensors, middle)),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
    }


FAMILY = TokenizerFamily(
    name="maskgit_vqgan",
    network=MaskGitVQGAN,
    layout=Layout(r"encoder\.down\.0\.block\.0\.conv1\.weight", grid.torch_name, sizes),
    parameters=PARAMETERS,
    to_8_bit=truncate,
    extent=("channel_mult",),
    published={((1, 1, 2, 2, 4),): ("MaskGIT-VQGAN", 54.5)},
)
