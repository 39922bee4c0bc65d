"""Convolutional networks that several tokenizers of the VQGAN family share (VQGAN, arXiv 2012.09841)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class Conv(nn.Conv):
    """A convolution that starts as its authors' does.

    Attributes:
      torch_init: kernel and bias are uniform in ±fan_in^-½, PyTorch's own start; else they are Flax's.
    """

    torch_init: bool = False

    def param(self, name: str, init: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Declares a parameter, as `nn.Module.param`."""
        if self.torch_init:
            kernel = shape if name == "kernel" else self.get_variable("params", "kernel").shape
            bound = math.prod(kernel[:-1]) ** -0.5
            init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        return super().param(name, init, shape, dtype)


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
    """Norm, SiLU, convolution, twice, plus a skip.

    Attributes:
      channels: of the result.
      dtype: of the computation.
      maskgit: as the published weights of MaskGIT-VQGAN and VQGAN+ want it: the convolutions have no bias, and where
        the number of channels changes the skip is a 1×1 convolution of the block's own *output*, not of its input.
      torch_init: see `Conv`.
    """

    channels: int
    dtype: Any = jnp.float32
    maskgit: bool = True
    torch_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W channels"]:
        conv = functools.partial(
            Conv, self.channels, use_bias=not self.maskgit, dtype=self.dtype, torch_init=self.torch_init
        )
        h = conv((3, 3), name="conv1")(nn.silu(GroupNorm(self.dtype, name="norm1")(x)))
        h = conv((3, 3), name="conv2")(nn.silu(GroupNorm(self.dtype, name="norm2")(h)))
        if x.shape[-1] == self.channels:
            return h + x
        return h + conv((1, 1), name="nin_shortcut")(h if self.maskgit else x)


class Down(nn.Module):
    """One encoder level: residual blocks, then half the resolution unless it is the last level.

    Attributes:
      channels: of the result.
      num_res_blocks: how many.
      halve: whether the resolution is halved.
      strided: by a convolution of stride 2 (VQGAN+), not by a 2×2 mean (MaskGIT-VQGAN).
      dtype: of the computation.
      torch_init: see `Conv`.
    """

    channels: int
    num_res_blocks: int
    halve: bool
    strided: bool
    dtype: Any = jnp.float32
    torch_init: bool = False

    def setup(self) -> None:
        block = functools.partial(ResidualBlock, self.channels, self.dtype, torch_init=self.torch_init)
        self.block = [block() for _ in range(self.num_res_blocks)]
        if self.halve and self.strided:
            self.down_conv = halving_conv(self.channels, self.dtype, torch_init=self.torch_init)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w channels"]:
        for block in self.block:
            x = block(x)
        if not self.halve:
            return x
        if self.strided:
            return self.down_conv(x)
        b, h, w, c = x.shape
        return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


class Up(nn.Module):
    """One decoder level: residual blocks, then nearest-neighbour doubling and a convolution if `double`."""

    channels: int
    num_res_blocks: int
    double: bool
    dtype: Any = jnp.float32
    torch_init: bool = False

    def setup(self) -> None:
        block = functools.partial(ResidualBlock, self.channels, self.dtype, torch_init=self.torch_init)
        self.block = [block() for _ in range(self.num_res_blocks)]
        if self.double:
            self.upsample_conv = Conv(self.channels, (3, 3), dtype=self.dtype, torch_init=self.torch_init)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W channels"]:
        for block in self.block:
            x = block(x)
        return self.upsample_conv(double_nearest(x)) if self.double else x


class Encoder(nn.Module):
    """Images in [0, 1] to latents before quantisation, float32; no attention.

    Attributes:
      hidden_channels: width of the outermost level.
      channel_mult: width of each level in units of hidden_channels, outermost first.
      num_res_blocks: residual blocks in each level and in the middle.
      z_channels: width of the latents.
      strided: see `Down`.
      dtype: of the computation.
      torch_init: see `Conv`.
    """

    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    strided: bool
    dtype: Any = jnp.float32
    torch_init: bool = False

    def setup(self) -> None:
        widths = [self.hidden_channels * m for m in self.channel_mult]
        last, start = len(widths) - 1, {"dtype": self.dtype, "torch_init": self.torch_init}
        self.conv_in = Conv(self.hidden_channels, (3, 3), use_bias=False, **start)
        self.down = [Down(w, self.num_res_blocks, i < last, self.strided, **start) for i, w in enumerate(widths)]
        self.mid = [ResidualBlock(widths[-1], **start) for _ in range(self.num_res_blocks)]
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = Conv(self.z_channels, (1, 1), **start)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        x = self.conv_in(images)
        for layer in (*self.down, *self.mid):
            x = layer(x)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


class Decoder(nn.Module):
    """Codebook vectors to images in [0, 1], unclamped, float32; no attention.

    Attributes:
      hidden_channels: width of the outermost level.
      channel_mult: width of each level in units of hidden_channels, outermost first.
      num_res_blocks: residual blocks in each level and in the middle.
      coarse_first: what level 0 of `up` is, which published files disagree on: the lowest resolution and so the first
        to run (VQGAN+), or the image's (MaskGIT-VQGAN).
      dtype: of the computation.
      torch_init: see `Conv`.
    """

    hidden_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    coarse_first: bool
    dtype: Any = jnp.float32
    torch_init: bool = False

    def setup(self) -> None:
        widths = [self.hidden_channels * m for m in self.channel_mult]
        start = {"dtype": self.dtype, "torch_init": self.torch_init}
        self.conv_in = Conv(widths[-1], (3, 3), **start)
        self.mid = [ResidualBlock(widths[-1], **start) for _ in range(self.num_res_blocks)]
        levels = [Up(w, self.num_res_blocks, i > 0, **start) for i, w in enumerate(widths)]
        self.up = levels[::-1] if self.coarse_first else levels
        self.norm_out = GroupNorm(self.dtype)
        self.conv_out = Conv(3, (3, 3), **start)

    def __call__(self, vectors: Float[Array, "B h w D"]) -> Float[Array, "B H W 3"]:
        x = self.conv_in(vectors)
        for layer in (*self.mid, *(self.up if self.coarse_first else reversed(self.up))):
            x = layer(x)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


def halving_conv(channels: int, dtype: Any, *, torch_init: bool, name: str | None = None) -> Conv:
    """A 3×3 convolution of stride 2, padded by one pixel below and on the right only, as in VQGAN."""
    padding = ((0, 1), (0, 1))
    return Conv(channels, (3, 3), strides=2, padding=padding, dtype=dtype, torch_init=torch_init, name=name)


def double_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    """Each pixel four times: twice the resolution by nearest neighbour."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _group_mean(means: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Each channel's value replaced by the mean over its group."""
    batch, channels = means.shape
    size = channels // math.gcd(32, channels)
    return jnp.repeat(jnp.mean(means.reshape(batch, -1, size), axis=-1), size, axis=-1)
