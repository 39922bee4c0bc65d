"""Classifier-free guidance and the filters of a sampler. Nothing here but jax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

ROUNDING = 1e-6  # of float32 sums, as a share of the largest logit

SCHEDULES = {
    "constant": lambda s, power: jnp.ones_like(s),
    "linear": lambda s, power: s,
    "power_cosine": lambda s, power: 0.5 * (1.0 - jnp.cos(jnp.pi * s**power)),
}


def guidance_weight(
    schedule: str,
    scale: float,
    step: Int[Array, ""] | int,
    num_steps: int,
    *,
    power: float = 1.0,
    interval: int = -1,
) -> Float[Array, ""]:
    """Guidance weight w of one decoding step: 1 is the conditional model alone, `scale` the full strength.

    Args:
      schedule: how w grows from 1 to `scale`, with s = step / num_steps:
        'power_cosine'  1 + (scale - 1)·½(1 - cos(π s^power)) (RAR and reAR; power 0 is constant);
        'linear'        1 + (scale - 1)·s;
        'constant'      scale.
      scale: full strength.
      step: 0-based index of the code that is about to be drawn.
      num_steps: number of codes in a sequence.
      power: exponent of 'power_cosine'.
      interval: the last decoding step that is guided, counted as LlamaGen does: the first code comes before step 0 and
        is always guided, the code with index n is drawn in step n - 1. -1 guides all.

    Raises:
      ValueError: the schedule has no such name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown guidance schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    share = SCHEDULES[schedule](jnp.asarray(step, jnp.float32) / num_steps, power)
    if interval >= 0:
        share = jnp.where(jnp.asarray(step) - 1 <= interval, share, 0.0)
    return 1.0 + (scale - 1.0) * share


def guide(
    conditional: Float[Array, "B K"], unconditional: Float[Array, "B K"], weight: Float[Array, ""] | float
) -> Float[Array, "B K"]:
    """Guided logits u + w·(c - u), in float32."""
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return unconditional + weight * (conditional - unconditional)


def keep_top_k(logits: Float[Array, "*B K"], k: int | Int[Array, ""]) -> Float[Array, "*B K"]:
    """Removes (-inf) all but the k largest logits of each row; values tied with the k-th stay. k = 0 keeps all.

    What is a rounding below the k-th stays too: a compiler may compute logits twice, once for the threshold and once to
    compare, and round them in two ways. An array k is a traced argument: other values of it need no other program, and
    it costs a sort.
    """
    size = logits.shape[-1]
    if isinstance(k, jax.Array):
        smallest = jnp.take(jnp.sort(logits, axis=-1), size - jnp.clip(k, 1, size), axis=-1)[..., None]
    elif 0 < k < size:
        smallest = jax.lax.top_k(logits, k)[0][..., -1:]
    else:
        return logits
    largest = jnp.max(jnp.where(jnp.isfinite(logits), jnp.abs(logits), 0.0), axis=-1, keepdims=True)
    return jnp.where((logits < smallest - ROUNDING * largest) & (k > 0), -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "*B K"], p: float | Float[Array, ""]) -> Float[Array, "*B K"]:
    """Keeps the smallest set of most probable codes whose probability exceeds p (nucleus sampling). p = 1 keeps all.

    The code that carries the sum across p stays, so at least one does. An array p is a traced argument.
    """
    if not isinstance(p, jax.Array) and p >= 1.0:
        return logits
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of all more likely codes
    rank = jnp.argsort(order, axis=-1)
    removed = jnp.take_along_axis(before > p, rank, axis=-1)
    return jnp.where(removed & (p < 1.0), -jnp.inf, logits)  # before may be above 1 by rounding


def draw(
    keys: PRNGKeyArray,
    logits: Float[Array, "B K"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] = 0,
    top_p: float | Float[Array, ""] = 1.0,
) -> Int[Array, " B"]:
    """Draws one code per row, each row with its own key; temperature 0 takes the most probable code.

    Temperature divides the logits first, then top-k and top-p filter what is left. Settings that are arrays are traced
    arguments: a program serves all their values.
    """
    traced = isinstance(temperature, jax.Array)
    if not traced and temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    divisor = jnp.where(temperature == 0.0, 1.0, temperature) if traced else temperature
    filtered = keep_top_p(keep_top_k(logits / divisor, top_k), top_p)
    codes = jax.vmap(jax.random.categorical)(keys, filtered)
    if traced:
        codes = jnp.where(temperature == 0.0, jnp.argmax(logits, axis=-1), codes)
    return codes.astype(jnp.int32)
