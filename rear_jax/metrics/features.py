"""Feature extractors: frozen networks from images to vectors, under one interface for every image metric."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network with its preprocessing.

    Attributes:
      name: short name for tables, such as "EffNetLite2@96".
      recipe: everything that decides the features, to be printed beside each number.
      dim: D, the width of the features.
      apply: images [B, H, W, 3], uint8 in [0, 255] or float in [0, 1], to features [B, D] float32; jitted.
    """

    name: str
    recipe: str
    dim: int
    apply: Callable[[jax.Array | np.ndarray], jax.Array]


def efficientnet_extractor(params: Any, variant: str, size: int) -> FeatureExtractor:
    """Pooled features of an EfficientNet-Lite on images resized to size × size.

    Args:
      params: of `EfficientNetLite(variant)`, as `rear_jax.convert.efficientnet.load` gives.
      variant: "lite0" or "lite2".
      size: side in pixels that the network sees.
    """
    apply = functools.partial(efficientnet_features, jax.device_put(params), variant=variant, size=size)
    return FeatureExtractor(
        name=f"EffNet{variant.capitalize()}@{size}",
        recipe=f"EfficientNet-{variant} pooled features; antialiased bilinear resize to {size}x{size}; float32",
        dim=efficientnet.FEATURES,
        apply=apply,
    )


@functools.partial(jax.jit, static_argnames=("variant", "size"))
def efficientnet_features(params: Any, images: jax.Array, *, variant: str, size: int) -> jax.Array:
    resized = _resize(_unit_range(images), size)
    return efficientnet.EfficientNetLite(variant).apply({"params": params}, resized).pooled


def _unit_range(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [0, 1]; floats are taken to lie there already."""
    return images / jnp.float32(255.0) if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def _resize(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, 3] to [B, size, size, 3], bilinear and antialiased; the identity when the size is already right."""
    return jax.image.resize(images, (len(images), size, size, 3), "bilinear", antialias=True)


def extract(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Features of a stream of image batches, in order.

    Smaller batches than the first, as a last one may be, are padded to its size and so compile nothing new. One batch
    is computed on the device while the next is being read.

    Args:
      extractor: what to apply.
      batches: arrays [b, H, W, 3] that the extractor takes, of one H, W and dtype.

    Returns:
      [n, D] float32.

    Raises:
      RearError: there are no images, or a batch is larger than the first.
    """
    computed: list[jax.Array | np.ndarray] = []
    size = 0
    for batch in batches:
        size = size or len(batch)
        if len(batch) > size:
            raise RearError(f"A batch of {len(batch)} images follows a first one of {size}; give batches of one size.")
        padded = batch if len(batch) == size else np.pad(batch, ((0, size - len(batch)), (0, 0), (0, 0), (0, 0)))
        running = extractor.apply(padded)[: len(batch)]
        if computed:
            computed[-1] = np.asarray(computed[-1])  # fetched while the new batch runs
        computed.append(running)
    if not size:
        raise RearError("There are no images to take features of; check the folder or the data set's split.")
    return np.concatenate(computed)
