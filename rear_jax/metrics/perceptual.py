"""A perceptual distance between images: how far apart a frozen network's feature maps are."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

EPSILON = 1e-10  # as in the reference LPIPS


def normalise_channels(x: jax.Array) -> jax.Array:
    """Scales the feature vector x of every pixel to x / (‖x‖ + 1e-10), in float32.

    A zero vector stays zero and passes no gradient (the true one is 1e10 or undefined there).

    Args:
      x: [B, H, W, C].
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
