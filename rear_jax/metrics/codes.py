"""What the papers' diagnostics do to codes: which of them are true, and which wrong ones are nearly right.

Pure functions on arrays (reAR, arXiv 2510.04450, section 3). The randomness of a sequence comes from its own key, so
that it does not depend on the batch; for a larger share the same sequence keeps what it had for a smaller one.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rear_jax.errors import RearError

ROWS = 256  # codes whose cosines to all others are computed at once
LEAST = 1e-12  # squared length below which a vector counts as zero


def count_of(share: float, num_codes: int) -> int:
    """⌊share · N⌋, where a share that is a whole number of codes but for rounding gives that number."""
    return math.floor(share * num_codes + 1e-9)


def front_mask(batch: int, num_codes: int, count: int) -> Bool[Array, "B N"]:
    """True at the first `count` positions of each sequence."""
    return jnp.broadcast_to(jnp.arange(num_codes) < count, (batch, num_codes))


def interleaved_mask(keys: PRNGKeyArray, num_codes: int, count: int) -> Bool[Array, "B N"]:
    """True at `count` random positions of each sequence; those of a smaller count are among those of a larger one.

    Args:
      keys: [B], one for each sequence.
      num_codes: N.
      count: in 0..N.
    """
    order = jax.vmap(lambda key: jax.random.permutation(key, num_codes))(keys)  # [B, N]: the rank of each position
    return order < count


def nearest_wrong(codebook: Float[Array, "K D"]) -> Int[Array, " K"]:
    """For each code the other one whose vector has the largest cosine to its own; never the code itself.

    Raises RearError: there is no other code.
    """
    size = len(codebook)
    if size < 2:
        raise RearError(f"A codebook of {size} code has no wrong code: use a larger one.")
    vectors = codebook.astype(jnp.float32)
    unit = vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(vectors**2, axis=-1, keepdims=True), LEAST))

    def nearest(code: jax.Array) -> jax.Array:
        cosines = jnp.matmul(unit, unit[code], precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(cosines.at[code].set(-jnp.inf))

    return jax.lax.map(nearest, jnp.arange(size), batch_size=min(ROWS, size)).astype(jnp.int32)


def replace_wrong(
    keys: PRNGKeyArray,
    predicted: Int[Array, "B N"],
    true: Int[Array, "B N"],
    nearest: Int[Array, " K"],
    share: float | Float[Array, ""],
) -> Int[Array, "B N"]:
    """Replaces each wrong prediction, with probability `share`, by the wrong code that is nearest to the true one.

    How many codes are right does not change.

    Args:
      keys: [B], one for each sequence.
      predicted: codes that a generator predicts.
      true: codes of the image.
      nearest: from `nearest_wrong`.
      share: r', in [0, 1].
    """
    drawn = jax.vmap(lambda key: jax.random.uniform(key, predicted.shape[1:]))(keys)
    return jnp.where((predicted != true) & (drawn < share), nearest[true], predicted)
