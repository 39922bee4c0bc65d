"""What `heads.Preparation` does, for heads that lie side by side in one axis of features.

A TPU fills the last axis up to 128. Queries [B, T, H, D] then take two to three times their room, and each sum over a
head is an operation that waits. Here a sum over each head is a product with a matrix of zeros and ones.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rear_jax.generators.heads import LAYER_EPSILON, RMS_EPSILON, Norm, Preparation, Rotation
from rear_jax.runtime.precision import in_float32


def prepared_together(
    qkv: Float[Array, "B T 3 H D"], preparation: Preparation
) -> tuple[Float[Array, "B T H*D"], Float[Array, "B T H*D"], Float[Array, "B T H*D"]]:
    """Queries and keys as they are multiplied, and values."""
    size = qkv.shape[-1]
    q, k, v = jnp.split(qkv.reshape(*qkv.shape[:2], -1), 3, axis=-1)
    if preparation.queries is not None:
        q, k = normalised(q, preparation.queries, size), normalised(k, preparation.keys, size)
    if preparation.rotation is not None:
        q, k = rotated(q, preparation.rotation, size), rotated(k, preparation.rotation, size)
    return q, k, v


def normalised(x: Float[Array, "B T H*D"], norm: Norm, size: int) -> Float[Array, "B T H*D"]:
    """As `heads.normalised`."""
    heads = x.shape[-1] // size
    members = jnp.repeat(jnp.eye(heads), size, axis=0)  # [H·D, H]

    def mean(x):
        """Of each head, in the place of each of its features."""
        sums = jnp.dot(x, members, precision="highest") / size
        return jnp.dot(sums, members.T, precision="highest")

    def layer_norm(x, scale, bias):
        x = x - mean(x)
        return x * jax.lax.rsqrt(mean(jnp.square(x)) + LAYER_EPSILON) * scale + bias

    def rms_norm(x, scale):
        return x * jax.lax.rsqrt(mean(jnp.square(x)) + RMS_EPSILON) * scale

    own = [jnp.tile(part, heads) for part in norm if part is not None]
    return in_float32(rms_norm if norm.bias is None else layer_norm, x.dtype)(x, *own)


def rotated(x: Float[Array, "B T H*D"], rotation: Rotation, size: int) -> Float[Array, "B T H*D"]:
    """As `heads.rotate`."""
    heads, distance = x.shape[-1] // size, rotation.distance(size)
    cos, sin = (jnp.tile(rotation.joined(part, part), heads) for part in rotation)  # [T, H·D] or [B, T, H·D]
    first = jnp.arange(x.shape[-1]) % (2 * distance) < distance

    def moved(x, places):
        """Features moved so many places to the right; what comes in is never read."""
        return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (places, -places, 0)))

    def turn(x, cos, sin):
        return x * cos + jnp.where(first, -moved(x, -distance), moved(x, distance)) * sin

    return in_float32(turn, x.dtype)(x, cos, sin)
