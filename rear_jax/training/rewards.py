"""What a sampled image is worth: how close it is to the image whose codes it was sampled from.

A part is a function (perceptual network, its parameters, samples [G, H, W, 3], image [1, H, W, 3]) -> distances [G],
images in [0, 1]. To add one: write it here, name it in PARTS, and give it a weight in `config.posttrain`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import losses
from rear_jax.training.perceptual import PerceptualNetwork

Part = Callable[[PerceptualNetwork, Any, jax.Array, jax.Array], jax.Array]


def squared_error(network: PerceptualNetwork, params: Any, samples: jax.Array, image: jax.Array) -> jax.Array:
    """Mean squared difference of pixels in [-1, 1]."""
    return 4.0 * losses.mean_squared_error(samples, jnp.broadcast_to(image, samples.shape))


def absolute_error(network: PerceptualNetwork, params: Any, samples: jax.Array, image: jax.Array) -> jax.Array:
    """Mean absolute difference of pixels in [-1, 1]."""
    return 2.0 * jnp.mean(jnp.abs(samples - image), axis=(1, 2, 3))


def perceptual(network: PerceptualNetwork, params: Any, samples: jax.Array, image: jax.Array) -> jax.Array:
    """Distance of a perceptual network's features; those of the image are computed once."""
    return network.compare(params, network.features(params, samples), network.features(params, image))


PARTS: dict[str, Part] = {"mse": squared_error, "l1": absolute_error, "perceptual": perceptual}


def reconstruction_rewards(
    settings: ConfigDict, network: PerceptualNetwork, params: Any, samples: jax.Array, image: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """R = -Σ weight · part, over the parts whose weight in `config.posttrain` is not 0 (VA-π, arXiv 2512.19680).

    Args:
      settings: `config.posttrain`.
      network, params: the perceptual network.
      samples: [G, H, W, 3] in [0, 1].
      image: [1, H, W, 3] in [0, 1].

    Returns:
      Rewards [G] and the parts [G] by name, before weighting.
    """
    weights = {name: settings[f"{name}_weight"] for name in PARTS}
    parts = {name: PARTS[name](network, params, samples, image) for name, weight in weights.items() if weight}
    return -sum(weights[name] * part for name, part in parts.items()), parts
