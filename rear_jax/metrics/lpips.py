"""LPIPS with VGG16: the learned perceptual distance of tokenizer losses, post-training rewards and the papers' tables.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv:1801.03924, in the
form of its package `lpips` (net 'vgg', version 0.1, linear heads); VGG16 is torchvision's, trained on ImageNet. The
weights are the user's: `rear_jax.convert.lpips` reads the two published files.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.metrics.perceptual import normalise_channels

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths; a max pool between stages
SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels, that the last stage still sees one


class LPIPS(nn.Module):
    """The distance of images [B, H, W, 3] in [0, 1]; H and W at least 16.

    `features` of a target that many images are compared with need computing only once: `distance` takes them.
    All arithmetic is float32 at full precision.
    """

    def setup(self) -> None:
        self.stages = [
            [
                nn.Conv(width, (3, 3), precision=jax.lax.Precision.HIGHEST, name=f"stage{stage}_conv{layer}")
                for layer, width in enumerate(widths)
            ]
            for stage, widths in enumerate(STAGES)
        ]
        self.heads = [
            nn.Conv(1, (1, 1), use_bias=False, precision=jax.lax.Precision.HIGHEST, name=f"head{stage}")
            for stage in range(len(STAGES))
        ]

    def features(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], ...]:
        """Channel-normalised activations after relu1_2, 2_2, 3_3, 4_3 and 5_3.

        Raises:
          RearError: the images are too small for the network.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise RearError(f"LPIPS wants images of {SMALLEST} pixels or more a side, these are {images.shape[1:3]}")
        x = (2.0 * images.astype(jnp.float32) - 1.0 - jnp.array(SHIFT, jnp.float32)) / jnp.array(SCALE, jnp.float32)
        found = []
        for index, convolutions in enumerate(self.stages):
            if index:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for convolution in convolutions:
                x = nn.relu(convolution(x))
            found.append(normalise_channels(x))
        return tuple(found)

    def layer_distances(
        self, a: Sequence[Float[Array, "B h w C"]], b: Sequence[Float[Array, "B h w C"]]
    ) -> Float[Array, "B 5"]:
        """What each of the five layers adds to the distance: its head on the squared difference, averaged over space.

        Args:
          a: `features` of some images.
          b: those of the images that they are compared with; batch axes of 1 are repeated.
        """
        distances = [jnp.mean(head((x - y) ** 2), axis=(1, 2, 3)) for head, x, y in zip(self.heads, a, b, strict=True)]
        return jnp.stack(distances, axis=-1)

    def distance(
        self, a: Sequence[Float[Array, "B h w C"]], b: Sequence[Float[Array, "B h w C"]]
    ) -> Float[Array, " B"]:
        """The distance of images of which the `features` are known; arguments as in `layer_distances`."""
        return jnp.sum(self.layer_distances(a, b), axis=-1)

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """The distance of each pair, float32 and not negative; 0 with zero gradient where the images are the same."""
        return self.distance(self.features(a), self.features(b))
