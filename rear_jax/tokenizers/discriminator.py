"""PatchGAN discriminator for training tokenizers (pix2pix, arXiv 1611.07004; as in VQGAN, arXiv 2012.09841)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.runtime.precision import of_products
from rear_jax.runtime.sharding import Rule, Rules
from rear_jax.tokenizers.blocks import GroupNorm

PARAMETERS: Rules = (
    Rule(r"(^|/)discriminator/.*kernel$", ("fsdp",), decays=True),
    Rule(r"(^|/)discriminator/.*(scale|bias)$"),
)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image: one logit each, high for real.

    Strided 4×4 convolutions with leaky ReLUs of slope 0.2. Where VQGAN normalises by batch statistics this one
    normalises each image by itself (GroupNorm), so that it has no running averages to carry, works at batch 1, and does
    not depend on how a batch is spread over devices. Convolutions start as N(0, 0.02).

    Attributes:
      base_channels: width after the first convolution; doubles with every layer up to 8-fold.
      num_layers: how many times the resolution is halved. 3 gives patches of 70 pixels; at 32-pixel images 2 leaves
        6×6 logits and 3 leaves 2×2.
      dtype: of the convolutions.
    """

    base_channels: int = 64
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """Logits, float32, of images in [0, 1].

        Raises RearError: the images are too small for so many layers.
        """
        smallest = 3 * 2**self.num_layers
        if min(images.shape[1:3]) < smallest:
            raise RearError(
                f"discriminator.num_layers {self.num_layers} wants images of {smallest} pixels or more, "
                f"these have {min(images.shape[1:3])}: lower it"
            )
        x = nn.leaky_relu(self._conv(self.base_channels, 2, use_bias=True)(2.0 * images - 1.0), 0.2)
        for layer in range(1, self.num_layers + 1):
            stride = 2 if layer < self.num_layers else 1
            x = self._conv(self.base_channels * min(2**layer, 8), stride, use_bias=False)(x)
            x = nn.leaky_relu(GroupNorm(self.dtype)(x), 0.2)
        return self._conv(1, 1, use_bias=True)(x).astype(jnp.float32)

    def _conv(self, channels: int, stride: int, *, use_bias: bool) -> nn.Conv:
        """A 4×4 convolution with one pixel of padding on every side."""
        return nn.Conv(
            channels,
            (4, 4),
            strides=stride,
            padding=1,
            use_bias=use_bias,
            kernel_init=jax.nn.initializers.normal(0.02),
            dtype=self.dtype,
            precision=of_products(),
        )


def shapes(module: PatchDiscriminator, image_size: int) -> Any:
    """Parameter shapes of a discriminator of images with so many pixels a side."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]
