"""LlamaGen's tokenizers VQ-16 and VQ-8: VQGAN with a narrow, normalised codebook (LlamaGen, arXiv 2406.06525).

VQ-16 (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 16384 codes of width 8) has 71.9M parameters and
turns 256×256 pixels into 16×16 codes; VQ-8 (× (1, 2, 2, 4)) turns them into 32×32. As in VQGAN (arXiv 2012.09841)
there is attention at the lowest resolution. The networks work in [-1, 1]; the interface stays in [0, 1].
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rear_jax.tokenizers import grid, quantizer
from rear_jax.tokenizers.blocks import Conv, GroupNorm, ResidualBlock, double_nearest, halving_conv
from rear_jax.tokenizers.family import PARAMETERS, TokenizerFamily
from rear_jax.weights.family import round_half_up
from rear_jax.weights.layout import Layout, Path, TorchName

WITHIN = ("gen_vision_model.", "model.vqmodel.")  # prefixes in Janus' files, and in transformers' copies of them
OWN_KEYS = (  # how transformers calls the layers -> how LlamaGen and Janus do
    (r"^(encoder|decoder)\.(?:down|up)\.(\d+)\.", r"\1.conv_blocks.\2."),
    (r"(\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
)

torch_conv = functools.partial(Conv, torch_init=True)


class Attention(nn.Module):
    """Every pixel attends to every pixel, one head as wide as the features, plus the input."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        b, h, w, c = x.shape
        conv = functools.partial(torch_conv, c, (1, 1), dtype=self.dtype)
        normed = GroupNorm(self.dtype, name="norm")(x)
        q, k, v = (conv(name=name)(normed).reshape(b, h * w, 1, c) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v)  # [B, HW, 1, C]; scale C^-½, softmax in float32
        return x + conv(name="proj_out")(attended.reshape(b, h, w, c))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if asked for, then the step to the next resolution.

    Attributes:
      channels: of the result.
      num_res_blocks: how many.
      attention: whether there is any.
      resample: the step to the next resolution, 'none' on the last.
      dtype: of the computation.
    """

    channels: int
    num_res_blocks: int
    attention: bool
    resample: Literal["downsample", "upsample", "none"]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w channels"]:
        for i in range(self.num_res_blocks):
            x = ResidualBlock(self.channels, self.dtype, maskgit=False, torch_init=True, name=f"res_{i}")(x)
            if self.attention:
                x = Attention(self.dtype, name=f"attn_{i}")(x)
        if self.resample == "downsample":
            return halving_conv(self.channels, self.dtype, torch_init=True, name="downsample")(x)
        if self.resample == "upsample":
            return torch_conv(self.channels, (3, 3), dtype=self.dtype, name="upsample")(double_nearest(x))
        return x


def _middle(channels: int, dtype: Any) -> list[nn.Module]:
    """What stands between the levels of an encoder and its output, and between a decoder's input and its levels."""
    block = functools.partial(ResidualBlock, channels, dtype, maskgit=False, torch_init=True)
    return [block(), Attention(dtype), block()]


class Encoder(nn.Module):
    """Images in [0, 1] to latents before quantisation, float32; sizes as in `LlamaGenVQ`."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_dim: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        widths = [self.channels * m for m in self.channel_mult]
        last = len(widths) - 1
        self.conv_in = torch_conv(self.channels, (3, 3), dtype=self.dtype)
        self.conv_blocks = [
            Level(w, self.num_res_blocks, i == last, "downsample" if i < last else "none", self.dtype)
            for i, w in enumerate(widths)
        ]
        self.mid = _middle(widths[-1], self.dtype)
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = torch_conv(self.z_channels, (3, 3), dtype=self.dtype)
        self.quant_conv = torch_conv(self.codebook_dim, (1, 1), dtype=self.dtype)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        x = self.conv_in(2.0 * images - 1.0)
        for layer in (*self.conv_blocks, *self.mid):
            x = layer(x)
        return self.quant_conv(self.conv_out(nn.silu(self.norm_out(x)))).astype(jnp.float32)


class Decoder(nn.Module):
    """Codebook vectors to images in [0, 1], unclamped, float32; sizes as in `LlamaGenVQ`.

    Level 0 of `conv_blocks` has the lowest resolution; every level has one residual block more than the encoder's.
    """

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        widths = [self.channels * m for m in reversed(self.channel_mult)]
        last = len(widths) - 1
        self.post_quant_conv = torch_conv(self.z_channels, (1, 1), dtype=self.dtype)
        self.conv_in = torch_conv(widths[0], (3, 3), dtype=self.dtype)
        self.mid = _middle(widths[0], self.dtype)
        self.conv_blocks = [
            Level(w, self.num_res_blocks + 1, i == 0, "upsample" if i < last else "none", self.dtype)
            for i, w in enumerate(widths)
        ]
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = torch_conv(3, (3, 3), dtype=self.dtype)

    def __call__(self, vectors: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(self.post_quant_conv(vectors))
        for layer in (*self.mid, *self.conv_blocks):
            x = layer(x)
        return 0.5 * (self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32) + 1.0)


class LlamaGenVQ(grid.GridTokenizer):
    """The tokenizer; its interface is `base.CodebookTokenizer`.

    Attributes:
      image_size: pixels along each side; a multiple of 2**(levels - 1).
      channels: width of the outermost level.
      channel_mult: width of each level in units of channels, outermost first; each further level halves the resolution.
      num_res_blocks: residual blocks in each level of the encoder.
      z_channels: width between the networks and the 1×1 convolutions to and from the codebook's width.
      codebook_size: number of codes.
      codebook_dim: width of latents and codes.
      l2_normalize: compare and decode vectors of length one, as published.
      dtype: of the convolutions; parameters, norms and distances are float32.
      precision: of products where dtype is float32, 'high' or 'highest', see `runtime.precision`.

    Raises RearError: the image size cannot be halved as often as the levels ask.
    """

    image_size: int
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    l2_normalize: bool = True
    dtype: Any = jnp.float32
    precision: str = "high"

    def setup(self) -> None:
        sizes = (self.channels, self.channel_mult, self.num_res_blocks, self.z_channels)
        self.encoder = Encoder(*sizes, self.codebook_dim, self.dtype)
        self.decoder = Decoder(*sizes, self.dtype)
        self.codebook = self.make_codebook(
            quantizer.unit_codebook_init if self.l2_normalize else quantizer.codebook_init
        )


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `LlamaGenVQ` lies in the file."""
    if "quant_conv" in path or "post_quant_conv" in path:  # parts of neither network there
        path = path[1:]
    if "downsample" in path or "upsample" in path:
        path = (*path[:-1], "conv", path[-1])
    return grid.torch_name(path)


def own_key(key: str) -> str:
    """The key of a tensor of VQ-16 in LlamaGen's files, from that in a file of Janus."""
    for prefix in WITHIN:
        key = key.removeprefix(prefix)
    for pattern, own in OWN_KEYS:
        key = re.sub(pattern, own, key)
    return key


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The attributes of `LlamaGenVQ` that a file determines: all but image_size, l2_normalize and dtype."""
    channels = tensors["encoder.conv_in.weight"].shape[0]
    levels = grid.numbered(tensors, "encoder.conv_blocks.{}.res.0.conv1.weight")
    blocks = grid.numbered(tensors, "encoder.conv_blocks.0.res.{}.conv1.weight")
    z_channels = tensors["encoder.conv_out.weight"].shape[0]
    codebook_size, codebook_dim = tensors["quantize.embedding.weight"].shape
    return {
        "channels": channels,
        "channel_mult": tuple(kernel.shape[0] // channels for kernel in levels),
        "num_res_blocks": len(blocks),
        "z_channels": z_channels,
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }


FAMILY = TokenizerFamily(
    name="llamagen_vq",
    network=LlamaGenVQ,
    layout=Layout(
        signature=r"encoder\.conv_blocks\.0\.res\.0\.conv1\.weight",
        torch_name=torch_name,
        sizes=sizes,
        ignore=("quantize.codebook_used",),  # the last codes seen in training, for a usage statistic
        under="model",
        within=dict.fromkeys(WITHIN, own_key),
    ),
    parameters=PARAMETERS,
    to_8_bit=round_half_up,
    extent=("channel_mult",),
    published={((1, 1, 2, 2, 4),): ("LlamaGen VQ-16", 71.9), ((1, 2, 2, 4),): ("LlamaGen VQ-8", 70.1)},
)
