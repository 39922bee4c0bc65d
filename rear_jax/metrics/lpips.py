"""LPIPS with VGG16: the learned perceptual distance of tokenizer losses, post-training rewards and the papers' tables.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv:1801.03924, in the
form of its package `lpips` (net 'vgg', version 0.1, linear heads); VGG16 is torchvision's, trained on ImageNet. The
weights are the user's: `load` reads the two published files.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.runtime.precision import products_at
from rear_jax.weights.layout import CONV, Path, TorchName, from_torch, is_float, outline, require_fit
from rear_jax.weights.shards import open_weights
from rear_jax.weights.views import View

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths; a max pool between stages
SHIFT = (-0.030, -0.088, -0.188)  # of images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels, that the last stage still sees one
EPSILON = 1e-10  # as in the reference


def normalise_channels(x: jax.Array) -> jax.Array:
    """Scales the feature vector x of every pixel of [B, H, W, C] to x / (‖x‖ + 1e-10), in float32.

    A zero vector stays zero and passes no gradient (the true one is 1e10 or undefined there).
    """
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    present = squared > 0
    norm = jnp.sqrt(jnp.where(present, squared, 1.0))
    return jnp.where(present, x / (norm + EPSILON), 0.0)


def perceptual_distance(taps_a: Sequence[jax.Array], taps_b: Sequence[jax.Array]) -> jax.Array:
    """LPIPS without learned heads: squared difference of channel-normalised feature maps.

    d(a, b) = mean over taps t and pixels p of ‖ â_tp − b̂_tp ‖², where â is `normalise_channels` of the feature vector;
    every tap counts alike and every pixel of a tap. A tap's pixel lies in [0, 4], so the distance does too. With
    learned non-negative heads in place of the plain sum over channels, and a sum over taps, it would be LPIPS.

    Args:
      taps_a: feature maps [B, H_t, W_t, C_t] of one batch of images, as a network gives for its taps.
      taps_b: those of the other batch, of the same shapes.

    Returns:
      [B] float32, differentiable in both; 0 with zero gradient where the images are the same.

    References:
      Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv:1801.03924.
    """
    distances = [
        jnp.mean(jnp.sum((normalise_channels(a) - normalise_channels(b)) ** 2, axis=-1), axis=(1, 2))
        for a, b in zip(taps_a, taps_b, strict=True)
    ]
    return jnp.mean(jnp.stack(distances), axis=0)


class LPIPS(nn.Module):
    """The distance of images [B, H, W, 3] in [0, 1]; H and W at least 16.

    `features` of a target that many images are compared with need computing only once: `distance` takes them.

    Attributes:
      precision: of the float32 products, see `runtime.precision`. Scores take 'highest', losses and rewards 'high'.
    """

    precision: str = "highest"

    def setup(self) -> None:
        self.stages = [
            [nn.Conv(width, (3, 3), name=f"stage{stage}_conv{layer}") for layer, width in enumerate(widths)]
            for stage, widths in enumerate(STAGES)
        ]
        self.heads = [nn.Conv(1, (1, 1), use_bias=False, name=f"head{stage}") for stage in range(len(STAGES))]

    def features(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B h w C"], ...]:
        """Channel-normalised activations after relu1_2, 2_2, 3_3, 4_3 and 5_3.

        Raises RearError: the images are too small for the network.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise RearError(f"LPIPS wants images of {SMALLEST} pixels or more a side, these are {images.shape[1:3]}")
        x = (2.0 * images.astype(jnp.float32) - 1.0 - jnp.array(SHIFT, jnp.float32)) / jnp.array(SCALE, jnp.float32)
        found = []
        for index, convolutions in enumerate(self.stages):
            if index:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for convolution in convolutions:
                with products_at(self.precision):
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
        with products_at(self.precision):
            weighed = [head((x - y) ** 2) for head, x, y in zip(self.heads, a, b, strict=True)]
        return jnp.stack([jnp.mean(layer, axis=(1, 2, 3)) for layer in weighed], axis=-1)

    def distance(
        self, a: Sequence[Float[Array, "B h w C"]], b: Sequence[Float[Array, "B h w C"]]
    ) -> Float[Array, " B"]:
        """The distance of images of which the `features` are known; arguments as in `layer_distances`."""
        return jnp.sum(self.layer_distances(a, b), axis=-1)

    def __call__(self, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
        """The distance of each pair, float32 and not negative; 0 with zero gradient where the images are the same."""
        return self.distance(self.features(a), self.features(b))


def load(vgg16: str, heads: str) -> Any:
    """The parameters of `LPIPS` from the files of torchvision's VGG16 and of the heads, float32 numpy.

    Raises RearError: a file is missing, damaged or of another network, or a head has a negative weight.
    """
    opened, source = open_weights(vgg16), f"{vgg16} with {heads}"
    tensors = View(opened, "", {key: key for key in opened if key.startswith("features.")})
    of_heads = head_tensors(open_weights(heads), source=heads)
    require_fit(outline(tensors) | of_heads, parameter_shapes(), torch_name, source=source)
    return params_from(dict(tensors) | of_heads, source=source)


def params_from(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> Any:
    """The parameters of `LPIPS` from `features.*` of VGG16 and `lin*.model.1.weight` in one state dict.

    Raises RearError: a tensor is missing, unexpected or of another shape.
    """
    return from_torch(tensors, parameter_shapes(), torch_name, source=source)


def parameter_shapes() -> Any:
    """Of `LPIPS`."""
    images = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    return jax.eval_shape(LPIPS().init, jax.random.key(0), images, images)["params"]


def head_tensors(tensors: Mapping[str, np.ndarray], *, source: str) -> dict[str, np.ndarray]:
    """The heads under their short names, `lin0.model.1.weight` to `lin4.model.1.weight`, whatever else is there.

    Raises RearError: some are missing or no heads of LPIPS-VGG, or a weight is negative or not a number.
    """
    found, shapes = {}, outline(tensors)
    for stage, widths in enumerate(STAGES):
        key = f"lin{stage}.model.1.weight"
        name = key if key in tensors else f"lins.{stage}.model.1.weight"
        if name not in tensors or shapes[name].shape != (1, widths[-1], 1, 1) or not is_float(shapes[name].dtype):
            raise RearError(f"{source} has no tensor {key}: give the heads of LPIPS-VGG, the lpips package's vgg.pth.")
        value = tensors[name]
        if not (value >= 0).all():
            raise RearError(f"{source}: {key} has negative weights, an LPIPS head has none; fetch the file again.")
        found[key] = value
    return found


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `LPIPS` lies in the files.

    torchvision numbers convolutions, ReLUs and pools in one row: stage 2's second convolution is `features.12`.
    """
    module, leaf = path
    if head := re.fullmatch(r"head(\d)", module):
        return TorchName(f"lin{head[1]}.model.1.weight", CONV)
    stage, layer = map(int, re.fullmatch(r"stage(\d)_conv(\d)", module).groups())
    before = sum(2 * len(widths) + 1 for widths in STAGES[:stage])
    place = f"features.{before + 2 * layer}"
    return TorchName(f"{place}.weight", CONV) if leaf == "kernel" else TorchName(f"{place}.bias")
