"""Feature extractors: frozen networks from images to vectors, under one interface for every image metric.

`NETWORKS` lists them by the name that `config.evaluate.network` gives.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet, inception
from rear_jax.runtime import local_devices, places
from rear_jax.runtime.identity import fingerprint

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # the digits are those that its SHA-256 begins with

Features = dict[str, np.ndarray]  # 'pooled' [n, D], and what else the network has


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network with its preprocessing.

    Attributes:
      name: short name for tables, such as "EffNetLite2@96".
      recipe: everything that decides the features but the weights, to be printed beside each number.
      dim: D, the width of the pooled features.
      apply: images [B, H, W, 3], uint8 in [0, 255] or float in [0, 1], to float32 features by name: 'pooled' [B, D],
        of Inception also 'spatial' [B, 2023] and 'logits' [B, 1008]; jitted.
      spatial_dim: width of the spatial features, 0 where there are none.
      fid: whether the published FID, sFID and Inception Score are computed from these features.
    """

    name: str
    recipe: str
    dim: int
    apply: Callable[[jax.Array | np.ndarray], dict[str, jax.Array]]
    spatial_dim: int = 0
    fid: bool = False


class Network(NamedTuple):
    """An extractor, the hash of its parameters, and the SHA-256 of the file they are from, '' of one from a package."""

    extractor: FeatureExtractor
    weights: str
    file: str = ""


def efficientnet_extractor(params: Any, variant: str, size: int) -> FeatureExtractor:
    """Pooled features of `EfficientNetLite(variant)` on images resized to size × size pixels."""
    apply = functools.partial(efficientnet_features, local_devices.copied(params), variant=variant, size=size)
    return FeatureExtractor(
        name=f"EffNet{variant.capitalize()}@{size}",
        recipe=f"EfficientNet-{variant} pooled features; antialiased bilinear resize to {size}x{size}; float32",
        dim=efficientnet.FEATURES,
        apply=apply,
    )


def inception_extractor(params: Any) -> FeatureExtractor:
    """What FID, sFID and the Inception Score are computed from, by parameters of `InceptionV3`."""
    return FeatureExtractor(
        name="Inception",
        recipe="Inception-v3 of 2015-12-05; TensorFlow 1's bilinear resize to 299x299; float32",
        dim=inception.POOLED,
        apply=functools.partial(_inception_features, local_devices.copied(params)),
        spatial_dim=inception.SPATIAL,
        fid=True,
    )


def load_network(settings: ConfigDict) -> Network:
    """The network of `config.evaluate` with its weights.

    Raises RearError: its name is unknown, or its weights are not given, missing, damaged or of another network.
    """
    if settings.network not in NETWORKS:
        raise RearError(f"config.evaluate.network = {settings.network!r}: use one of {', '.join(NETWORKS)}.")
    return NETWORKS[settings.network](settings)


def _load_efficientnet(settings: ConfigDict) -> Network:
    params = efficientnet.load(settings.network)
    extractor = efficientnet_extractor(params, settings.network, settings.feature_size)
    return Network(extractor, fingerprint(params, {}))


def _load_inception(settings: ConfigDict) -> Network:
    if not settings.inception:
        raise RearError(
            f"config.evaluate.network = {settings.network!r} needs its weights: give config.evaluate.inception, the "
            f"file {INCEPTION_FILE}."
        )
    params = inception.load(settings.inception)
    with places.local(settings.inception).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Network(inception_extractor(params), fingerprint(params, {}), digest)


NETWORKS: dict[str, Callable[[ConfigDict], Network]] = {
    **dict.fromkeys(efficientnet.SCALES, _load_efficientnet),
    "inception": _load_inception,
}


@functools.partial(jax.jit, static_argnames=("variant", "size", "precision"))
def efficientnet_features(
    params: Any, images: jax.Array, *, variant: str, size: int, precision: str = "highest"
) -> dict[str, jax.Array]:
    """{'pooled': [B, 1280] features} of images [B, H, W, 3], which `EfficientNetLite` sees at `size` pixels a side."""
    network = efficientnet.EfficientNetLite(variant, precision)
    return {"pooled": network.apply({"params": params}, _resize(_unit_range(images), size)).pooled}


@jax.jit
def _inception_features(params: Any, images: jax.Array) -> dict[str, jax.Array]:
    levels = images if images.dtype == jnp.uint8 else 255.0 * images
    outputs = inception.InceptionV3().apply({"params": params}, inception.resize(levels))
    return {"pooled": outputs.pooled, "spatial": outputs.spatial, "logits": outputs.logits}


def _unit_range(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]; floats are taken to lie there already."""
    return images / jnp.float32(255.0) if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def _resize(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, 3] to [B, size, size, 3], bilinear and antialiased; the identity when the size is already right."""
    return jax.image.resize(images, (len(images), size, size, 3), "bilinear", antialias=True)


def stream(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> Iterator[Features]:
    """The features of each of a stream of image batches [b, H, W, 3], on the host: see `local_devices.stream`."""
    return local_devices.stream(extractor.apply, batches)


def extract(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> np.ndarray:
    """The pooled features [n, D] of a stream of image batches, see `stream`."""
    return np.concatenate([features["pooled"] for features in stream(extractor, batches)])
