"""VQGAN+: MaskGIT-VQGAN with learned downsampling and a narrower codebook (MaskBit, arXiv 2409.16211).

The published network (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 4096 codes of width 64) has 55.0M
parameters and turns 256×256 pixels into 16×16 codes. Images come in and go out in its own range, [0, 1].
"""

from typing import ClassVar

from rear_jax.tokenizers.maskgit_vqgan import MaskGitVQGAN


class VQGANPlus(MaskGitVQGAN):
    """The tokenizer: MaskGIT-VQGAN's attributes and methods."""

    strided: ClassVar[bool] = True
    coarse_first: ClassVar[bool] = True
