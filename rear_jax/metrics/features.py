"""Feature extractors: frozen networks from images to vectors, under one interface for every image metric."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import local_devices
from rear_jax.metrics import efficientnet, inception

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
    """

    name: str
    recipe: str
    dim: int
    apply: Callable[[jax.Array | np.ndarray], dict[str, jax.Array]]
    spatial_dim: int = 0


def efficientnet_extractor(params: Any, variant: str, size: int) -> FeatureExtractor:
    """Pooled features of an EfficientNet-Lite on images resized to size × size.

    Args:
      params: of `EfficientNetLite(variant)`, as `rear_jax.convert.efficientnet.load` gives.
      variant: "lite0" or "lite2".
      size: side in pixels that the network sees.
    """
    apply = functools.partial(efficientnet_features, local_devices.copied(params), variant=variant, size=size)
    return FeatureExtractor(
        name=f"EffNet{variant.capitalize()}@{size}",
        recipe=f"EfficientNet-{variant} pooled features; antialiased bilinear resize to {size}x{size}; float32",
        dim=efficientnet.FEATURES,
        apply=apply,
    )


def inception_extractor(params: Any) -> FeatureExtractor:
    """What FID, sFID and the Inception Score are computed from.

    Args:
      params: of `InceptionV3`, as `rear_jax.convert.inception.load` gives.
    """
    return FeatureExtractor(
        name="Inception",
        recipe="Inception-v3 of 2015-12-05; TensorFlow 1's bilinear resize to 299x299; float32",
        dim=inception.POOLED,
        apply=functools.partial(_inception_features, local_devices.copied(params)),
        spatial_dim=inception.SPATIAL,
    )


@functools.partial(jax.jit, static_argnames=("variant", "size"))
def efficientnet_features(params: Any, images: jax.Array, *, variant: str, size: int) -> dict[str, jax.Array]:
    resized = _resize(_unit_range(images), size)
    return {"pooled": efficientnet.EfficientNetLite(variant).apply({"params": params}, resized).pooled}


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
    """Features of a stream of image batches, batch by batch in order, see `local_devices.stream`.

    Args:
      extractor: what to apply.
      batches: arrays [b, H, W, 3] that the extractor takes, of one H, W and dtype, none larger than the first.

    Yields:
      The extractor's features of each batch, on the host.
    """
    return local_devices.stream(extractor.apply, batches)


def extract(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> np.ndarray:
    """The pooled features [n, D] of a stream of image batches, see `stream`."""
    return np.concatenate([features["pooled"] for features in stream(extractor, batches)])
