"""MaskGIT-VQGAN: a convolutional tokenizer without attention (MaskGIT, arXiv 2202.04200; VQGAN, arXiv 2012.09841).

The published network (128 channels × (1, 1, 2, 2, 4), 2 residual blocks a level, 1024 codes of width 256) has 54.5M
parameters and turns 256×256 pixels into 16×16 codes. Images come in and go out in its own range, [0, 1].
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rear_jax.errors import RearError
from rear_jax.tokenizers import quantizer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class GroupNorm(nn.Module):
    """Group normalisation with eps 1e-6 over 32 groups, or the most that divide both 32 and the channels.

    Statistics are float32. Channels are averaged over space first and grouped afterwards, so that the large arrays keep
    their layout: on a CPU this is faster than reducing over [B, H, W, groups, channels / groups].

    Attributes:
      dtype: of the result.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(jnp.float32)
        mean = _group_mean(jnp.mean(x, axis=(1, 2)))  # [B, C]
        variance = _group_mean(jnp.mean(jnp.square(x), axis=(1, 2))) - jnp.square(mean)
        gain = scale * jax.lax.rsqrt(jnp.maximum(variance, 0.0) + 1e-6)
        shift = bias - mean * gain
        return (x * gain[:, None, None] + shift[:, None, None]).astype(self.dtype)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, plus a skip; the convolutions have no bias.

    Where the number of channels changes, the skip is a 1×1 convolution of the block's own *output*, not of its input:
    the published weights were trained so.

    Attributes:
      channels: of the result.
      dtype: of the computation.
    """

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W channels"]:
        conv = functools.partial(nn.Conv, self.channels, use_bias=False, dtype=self.dtype)
        h = conv((3, 3), name="conv1")(nn.silu(GroupNorm(self.dtype, name="norm1")(x)))
        h = conv((3, 3), name="conv2")(nn.silu(GroupNorm(self.dtype, name="norm2")(h)))
        skip = x if x.shape[-1] == self.channels else conv((1, 1), name="nin_shortcut")(h)
        return h + skip


class Down(nn.Module):
    """One encoder level: residual blocks, then a 2×2 mean unless it is the last level."""

    channels: int
    num_res_blocks: int
    halve: bool
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.block = [ResidualBlock(self.channels, self.dtype) for _ in range(self.num_res_blocks)]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w channels"]:
        for block in self.block:
            x = block(x)
        if self.halve:
            b, h, w, c = x.shape
            x = jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))
        return x


class Up(nn.Module):
    """One decoder level: residual blocks, then nearest-neighbour doubling and a convolution unless it is level 0."""

    channels: int
    num_res_blocks: int
    double: bool
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.block = [ResidualBlock(self.channels, self.dtype) for _ in range(self.num_res_blocks)]
        if self.double:
            self.upsample_conv = nn.Conv(self.channels, (3, 3), dtype=self.dtype)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W channels"]:
        for block in self.block:
            x = block(x)
        if self.double:
            b, h, w, c = x.shape
            x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
            x = self.upsample_conv(x)
        return x


class Encoder(nn.Module):
    """Images in [0, 1] to latents before quantisation, float32."""

    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        widths = [self.hidden_channels * m for m in self.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv(self.hidden_channels, (3, 3), use_bias=False, dtype=self.dtype)
        self.down = [Down(w, self.num_res_blocks, i < last, self.dtype) for i, w in enumerate(widths)]
        self.mid = [ResidualBlock(widths[-1], self.dtype) for _ in range(self.num_res_blocks)]
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = nn.Conv(self.z_channels, (1, 1), dtype=self.dtype)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        x = self.conv_in(images)
        for layer in (*self.down, *self.mid):
            x = layer(x)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


class Decoder(nn.Module):
    """Codebook vectors to images in [0, 1], unclamped, float32. Level i of `up` works at 1/2**i of the image size."""

    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        widths = [self.hidden_channels * m for m in self.channel_mult]
        self.conv_in = nn.Conv(widths[-1], (3, 3), dtype=self.dtype)
        self.mid = [ResidualBlock(widths[-1], self.dtype) for _ in range(self.num_res_blocks)]
        self.up = [Up(w, self.num_res_blocks, i > 0, self.dtype) for i, w in enumerate(widths)]
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = nn.Conv(3, (3, 3), dtype=self.dtype)

    def __call__(self, vectors: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(vectors)
        for layer in (*self.mid, *reversed(self.up)):
            x = layer(x)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


class MaskGitVQGAN(nn.Module):
    """The tokenizer; its interface is `rear_jax.tokenizers.Tokenizer`.

    Attributes:
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

    image_size: int
    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    l2_normalize: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise RearError(
                f"data.image_size {self.image_size} is not a multiple of {factor}: "
                f"change it, or give tokenizer.channel_mult another number of levels than {len(self.channel_mult)}"
            )
        super().__post_init__()

    def setup(self) -> None:
        sizes = (self.hidden_channels, self.channel_mult, self.num_res_blocks)
        self.encoder = Encoder(*sizes, self.z_channels, self.dtype)
        self.decoder = Decoder(*sizes, self.dtype)
        init = functools.partial(quantizer.codebook_init, l2_normalize=self.l2_normalize)
        self.codebook = self.param("codebook", init, (self.codebook_size, self.z_channels))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.image_size // 2 ** (len(self.channel_mult) - 1)
        return side, side

    @property
    def codes_per_image(self) -> int:
        """N."""
        return math.prod(self.grid)

    @property
    def embedding_dim(self) -> int:
        """D, the width of a codebook vector."""
        return self.z_channels

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Latents before quantisation."""
        return self.encoder(images)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of images, row by row."""
        codes = quantizer.search(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return codes.reshape(codes.shape[0], -1)

    def embed(self, codes: Int[Array, "*B N"]) -> Float[Array, "*B N D"]:
        """Codebook vectors of codes."""
        return quantizer.look_up(codes, self.codebook, l2_normalize=self.l2_normalize)

    def decode_embeddings(self, vectors: Float[Array, "B h w D"] | Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of codebook vectors or mixtures of them, as a grid or as a sequence; unclamped."""
        return self.decoder(vectors.reshape(-1, *self.grid, self.z_channels))

    def decode(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images of codes, unclamped."""
        return self.decode_embeddings(self.embed(codes))

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], quantizer.Quantized]:
        """Reconstruction, unclamped, and what quantisation gave, on the grid [B, h, w, ...]."""
        quantized = quantizer.quantize(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return self.decode_embeddings(quantized.vectors), quantized


def _group_mean(means: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Each channel's value replaced by the mean over its group."""
    batch, channels = means.shape
    size = channels // math.gcd(32, channels)
    return jnp.repeat(jnp.mean(means.reshape(batch, -1, size), axis=-1), size, axis=-1)
