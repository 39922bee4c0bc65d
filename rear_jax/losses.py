"""Loss functions of rear_jax: arrays in, arrays out, float32 inside whatever comes in. Nothing here but jax.

Every function returns a value per element or per example; means are the caller's, except where a paper defines one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


def next_code_cross_entropy(logits: Float[Array, "*B K"], codes: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """Negative log-likelihood, in nats, of each code under its logits.

    Args:
      logits: unnormalised log-probabilities, any float dtype; computed in float32 or better.
      codes: targets in [0, K).
    """
    logits = _at_least_float32(logits)
    target = jnp.take_along_axis(logits, codes[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target


def correct_codes(logits: Float[Array, "*B K"], codes: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """1 where the most probable code is the true one, else 0: its mean is the correct-token ratio."""
    return (jnp.argmax(logits, axis=-1) == codes).astype(jnp.float32)


def negative_cosine(x: Float[Array, "*B D"], y: Float[Array, "*B D"], *, epsilon: float = 1e-8) -> Float[Array, "*B"]:
    """-cos(x, y), in [-1, 1]; a zero vector gives 0 and has a finite gradient."""
    x, y = _at_least_float32(x), _at_least_float32(y)
    return -jnp.sum(_unit(x, epsilon) * _unit(y, epsilon), axis=-1)


class EmbeddingLosses(NamedTuple):
    """The two terms of reAR's codebook-embedding regularisation, each a scalar mean over B·N positions."""

    shallow: Float[Array, ""]
    deep: Float[Array, ""]


def codebook_embedding_losses(
    shallow: Float[Array, "B N D"],
    deep: Float[Array, "B N D"],
    embeddings: Float[Array, "B N D"],
    replaced: Bool[Array, "B N"],
    *,
    reading: Literal["released", "paper"] = "released",
) -> EmbeddingLosses:
    """reAR's regularisation: hidden states predict codebook embeddings (arXiv 2510.04450, section 4.2).

    Args:
      shallow: projected hidden state of a shallow layer at the position that *reads* code n.
      deep: projected hidden state of a deep layer at the position that *predicts* code n.
      embeddings: codebook vectors of the clean codes; no gradient flows into them.
      replaced: where the context code was replaced by noise.
      reading: 'released' leaves the replaced positions out of the shallow term while still dividing by all B·N
        (the authors' code, which produced the published results); 'paper' keeps them.

    Returns:
      Means of the negative cosine over both terms, each in [-1, 1].
    """
    embeddings = jax.lax.stop_gradient(embeddings)
    shallow_distance = negative_cosine(shallow, embeddings)
    if reading == "released":
        shallow_distance = jnp.where(replaced, 0.0, shallow_distance)
    elif reading != "paper":
        raise ValueError(f"unknown reading {reading!r}: use 'released' or 'paper'")
    return EmbeddingLosses(jnp.mean(shallow_distance), jnp.mean(negative_cosine(deep, embeddings)))


def mean_squared_error(x: Float[Array, "B ..."], y: Float[Array, "B ..."]) -> Float[Array, " B"]:
    """Mean squared difference of each example."""
    difference = _at_least_float32(x) - _at_least_float32(y)
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, x.ndim)))


def hinge_discriminator(real: Float[Array, "..."], fake: Float[Array, "..."]) -> Float[Array, ""]:
    """Hinge loss of a discriminator, ½·E[max(0, 1 - real) + max(0, 1 + fake)] (VQGAN, arXiv 2012.09841)."""
    real, fake = _at_least_float32(real), _at_least_float32(fake)
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def hinge_generator(fake: Float[Array, "..."]) -> Float[Array, ""]:
    """The generator's side of the hinge game: -E[fake logits]."""
    return -jnp.mean(_at_least_float32(fake))


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Half precision becomes float32; float32 and float64 stay."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(x: jax.Array, epsilon: float) -> jax.Array:
    """x / max(|x|, epsilon) along the last axis, with a gradient that is finite at zero."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))
