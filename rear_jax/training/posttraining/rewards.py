"""What a sampled image is worth: how close it is to its original, how real it looks, how well it fits its label.

A reward is a function (images [B, H, W, 3] in [0, 1], labels [B], seen) -> [B], higher is better; `seen` is what else
there is to look at. To add one, write it, name it in REWARDS, and give it a weight in `config.posttrain.reward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import losses
from rear_jax.errors import RearError

if TYPE_CHECKING:
    from rear_jax.training.posttraining.parts import Networks


class Seen(NamedTuple):
    """What a reward may look at beside the sampled images and their labels.

    Attributes:
      networks, frozen: modules and their parameters by name.
      codes: [B, N] that the images were decoded from; None where they were decoded from mixtures of codes.
      original: [1, H, W, 3] in [0, 1], the image that all of them stand for; in free-running rollouts only an image
        of the same label.
    """

    networks: Networks
    frozen: dict[str, Any]
    codes: jax.Array | None
    original: jax.Array


Reward = Callable[[jax.Array, jax.Array, Seen], jax.Array]


def squared_error(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the mean squared difference from the original, pixels in [-1, 1]."""
    return -4.0 * losses.mean_squared_error(images, jnp.broadcast_to(seen.original, images.shape))


def absolute_error(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the mean absolute difference from the original, pixels in [-1, 1]."""
    return -2.0 * jnp.mean(jnp.abs(images - seen.original), axis=(1, 2, 3))


def perceptual(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Minus the distance from the original in a perceptual network's features, which see the original once."""
    network, params = seen.networks.perceptual, seen.frozen["perceptual"]
    return -network.compare(params, network.features(params, images), network.features(params, seen.original))


def codebook_cosine(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Mean cosine, less 1, between the sampled codes' vectors and what the encoder makes of the original."""
    tokenizer, variables = seen.networks.tokenizer, {"params": seen.frozen["tokenizer"]}
    vectors = tokenizer.apply(variables, seen.codes, method="embed")  # [B, N, D]
    latents = tokenizer.apply(variables, seen.original, method="latents").reshape(1, *vectors.shape[1:])
    return -1.0 - jnp.mean(losses.negative_cosine(vectors, latents), axis=-1)


def discriminator(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Mean PatchGAN logit, high for real, of the discriminator that the tokenizer was trained with."""
    logits = seen.networks.discriminator.apply({"params": seen.frozen["discriminator"]}, images)
    return jnp.mean(logits, axis=(1, 2, 3))


def class_probability(images: jax.Array, labels: jax.Array, seen: Seen) -> jax.Array:
    """Log-probability of the label under a linear probe of real images, see `class_probe`."""
    return seen.networks.class_probe.log_probability(seen.frozen["class_probe"], images, labels)


REWARDS: dict[str, Reward] = {
    "mse": squared_error,
    "l1": absolute_error,
    "perceptual": perceptual,
    "codebook": codebook_cosine,
    "discriminator": discriminator,
    "class_probability": class_probability,
}
COMPARES = ("mse", "l1", "perceptual", "codebook")  # with the original: meaningless for free-running rollouts
READS_CODES = ("codebook",)  # and not the images: it says nothing of a decoder, and mixtures of codes have none


def wanted(settings: ConfigDict) -> dict[str, float]:
    """Weights in `config.posttrain.reward` that are not 0, by name."""
    return {name: weight for name, weight in settings.reward.items() if weight}


def refuse(settings: ConfigDict, names: tuple[str, ...], reason: str) -> None:
    """Raises RearError if one of the rewards `names` has a weight, and says why that cannot be."""
    if wrong := [name for name in names if name in wanted(settings)]:
        others = ", ".join(name for name in REWARDS if name not in names)
        raise RearError(f"config.posttrain.reward.{wrong[0]} {reason}: set it to 0, and use {others}.")


def total(
    settings: ConfigDict, images: jax.Array, labels: jax.Array, seen: Seen
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """R = Σ weight · reward; with the default weights R = -(MSE + perceptual distance) (VA-π, arXiv 2512.19680).

    Args:
      settings: `config.posttrain`.
      images: [B, H, W, 3] in [0, 1].
      labels: [B].
      seen: what else to look at.

    Returns:
      R [B], and each reward [B] by name, before weighting.
    """
    weights = wanted(settings)
    parts = {name: REWARDS[name](images, labels, seen) for name in weights}
    return sum(weights[name] * part for name, part in parts.items()), parts
