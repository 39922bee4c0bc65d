"""MaskGIT-VQGAN: a convolutional tokenizer without attention (MaskGIT, arXiv 2202.04200; VQGAN, arXiv 2012.09841).

The published network (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 1024 codes of width 256) has 54.5M
parameters and turns 256×256 pixels into 16×16 codes. Images come in and go out in its own range, [0, 1].
"""

import functools
from typing import Any, ClassVar

import jax.numpy as jnp

from rear_jax.tokenizers import quantizer
from rear_jax.tokenizers.blocks import Decoder, Encoder
from rear_jax.tokenizers.grid import GridTokenizer


class MaskGitVQGAN(GridTokenizer):
    """The tokenizer; its interface is `rear_jax.tokenizers.Tokenizer`.

    Attributes:
      strided: whether levels are halved by a convolution of stride 2 instead of a 2×2 mean.
      coarse_first: whether `decoder.up` begins with the smallest resolution, as its parameters are named.
      image_size: pixels along each side; a multiple of 2**(levels - 1).
      hidden_channels: width of the outermost level.
      channel_mult: width of each level in units of hidden_channels, outermost first; each further level halves the
        resolution.
      num_res_blocks: residual blocks in each level and in the middle.
      z_channels: width of latents and codes.
      codebook_size: number of codes.
      l2_normalize: compare and decode vectors of length one.
      dtype: of the convolutions; parameters, norms and distances are float32.

    Raises:
      RearError: the image size cannot be halved as often as the levels ask.
    """

    strided: ClassVar[bool] = False
    coarse_first: ClassVar[bool] = False
    image_size: int
    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    l2_normalize: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        sizes = (self.hidden_channels, self.channel_mult, self.num_res_blocks)
        self.encoder = Encoder(*sizes, self.z_channels, strided=self.strided, dtype=self.dtype)
        self.decoder = Decoder(*sizes, coarse_first=self.coarse_first, dtype=self.dtype)
        init = functools.partial(quantizer.codebook_init, l2_normalize=self.l2_normalize)
        self.codebook = self.param("codebook", init, (self.codebook_size, self.z_channels))

    @property
    def embedding_dim(self) -> int:
        """D, the width of a codebook vector."""
        return self.z_channels
