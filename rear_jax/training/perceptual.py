"""The frozen networks that a loss or a reward may see images through, by the name that a config gives them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax.convert import efficientnet as efficientnet_weights
from rear_jax.convert import lpips as lpips_weights
from rear_jax.errors import RearError
from rear_jax.metrics.efficientnet import SCALES, EfficientNetLite
from rear_jax.metrics.lpips import LPIPS
from rear_jax.metrics.perceptual import perceptual_distance

Features = Sequence[jax.Array]  # one map [B, h, w, C] per layer that is compared


class PerceptualNetwork(NamedTuple):
    """A network and how two images differ in it; images are [B, H, W, 3] floats in [0, 1].

    The functions take the parameters as their first argument, so that a compiled step need not hold them as constants.

    Attributes:
      params: frozen.
      features: (params, images) -> what is to be compared; of a target that meets many images it is computed once.
      compare: (params, features, features) -> distances [B] float32.
    """

    params: Any
    features: Callable[[Any, jax.Array], Features]
    compare: Callable[[Any, Features, Features], jax.Array]

    def distance(self, params: Any, a: jax.Array, b: jax.Array) -> jax.Array:
        """Distance of each pair of images, [B] float32, differentiable in both."""
        return self.compare(params, self.features(params, a), self.features(params, b))


def load(name: str, lpips: ConfigDict, *, option: str) -> PerceptualNetwork:
    """Makes a perceptual network with its published weights.

    Args:
      name: 'lite0' or 'lite2', EfficientNet-Lite without learned heads, or 'lpips', LPIPS with VGG16.
      lpips: the config's section of that name, the files of the latter.
      option: dotted name of the setting that chose `name`, for messages.

    Raises:
      RearError: the name is unknown, or its weights are not there.
    """
    network = outline(name, option=option)
    if name in SCALES:
        return network._replace(params=efficientnet_weights.load(name))
    return lpips_vgg16(lpips, wanted_by=f"{option} = 'lpips'")


def outline(name: str, *, option: str) -> PerceptualNetwork:
    """The same network with the shapes of its parameters in their place; arguments and errors as of `load`."""
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    if name in SCALES:
        return _efficientnet(name, jax.eval_shape(EfficientNetLite(name).init, jax.random.key(0), image)["params"])
    if name != "lpips":
        raise RearError(f"{option} = {name!r} is no perceptual network: use {', '.join(SCALES)} or lpips.")
    return _lpips(jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)["params"])


def lpips_vgg16(files: ConfigDict, *, wanted_by: str) -> PerceptualNetwork:
    """LPIPS with the weights that `config.lpips` names.

    Args:
      files: that section.
      wanted_by: who asks, for messages.

    Raises:
      RearError: a file is not given, missing, damaged or of another network.
    """
    for key, what in {"vgg16": "torchvision's VGG16 file", "heads": "the lpips package's weights/v0.1/vgg.pth"}.items():
        if not files[key]:
            raise RearError(f"{wanted_by} needs the weights of LPIPS: give config.lpips.{key}, {what}.")
    return _lpips(lpips_weights.load(files.vgg16, files.heads))


def _efficientnet(variant: str, params: Any) -> PerceptualNetwork:
    """EfficientNet-Lite 'lite0' or 'lite2' under `perceptual_distance`."""
    network = EfficientNetLite(variant)
    return PerceptualNetwork(
        params,
        features=lambda params, images: network.apply({"params": params}, images).taps,
        compare=lambda _, a, b: perceptual_distance(a, b),
    )


def _lpips(params: Any) -> PerceptualNetwork:
    """LPIPS with VGG16."""
    network = LPIPS()
    return PerceptualNetwork(
        params,
        features=lambda params, images: network.apply({"params": params}, images, method="features"),
        compare=lambda params, a, b: network.apply({"params": params}, a, b, method="distance"),
    )
