"""Noisy context: the codes that a generator reads are partly replaced, the codes it must predict are not.

Pure functions on arrays (reAR, arXiv 2510.04450, section 4.1; released training code). Nothing here but jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

SCHEDULES = {
    "none": lambda t, rate: jnp.zeros_like(t),
    "annealed": lambda t, rate: jnp.maximum(0.0, 1.0 - 4.0 * t / 3.0),
    "linear": lambda t, rate: 1.0 - t,
    "uniform": lambda t, rate: jnp.full_like(t, rate),
    "fixed": lambda t, rate: jnp.full_like(t, rate),
}


def noise_rates(
    key: PRNGKeyArray, schedule: str, progress: Float[Array, ""] | float, batch: int, *, rate: float = 0.5
) -> Float[Array, " B"]:
    """Draws one replacement probability per sequence, ε ~ U(0, f(t)).

    Args:
      key: random key.
      schedule: the ceiling f(t), by name:
        'annealed'  max(0, 1 - 4t/3), reaching 0 at 75 % of training (reAR's best);
        'linear'    1 - t;
        'uniform'   constant `rate`, so ε ~ U(0, rate) throughout;
        'fixed'     ε = `rate` exactly, no draw;
        'none'      ε = 0, the plain autoregressive baseline.
      progress: t = step / total steps, in [0, 1].
      batch: number of sequences B.
      rate: the constant of 'uniform' and 'fixed', in [0, 1].

    Returns:
      Rates in [0, 1].

    Raises:
      ValueError: the schedule has no such name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown noise schedule {schedule!r}: use one of {', '.join(SCHEDULES)}")
    ceiling = SCHEDULES[schedule](jnp.asarray(progress, jnp.float32), rate)
    if schedule == "fixed":
        return jnp.full((batch,), ceiling)
    return ceiling * jax.random.uniform(key, (batch,))


def corrupt(
    key: PRNGKeyArray,
    codes: Int[Array, "B N"],
    rates: Float[Array, " B"],
    codebook_size: int,
    *,
    different: bool = False,
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """Replaces each code, with its sequence's probability, by a uniformly drawn one.

    Args:
      key: random key.
      codes: clean codes in [0, K).
      rates: replacement probability of each sequence.
      codebook_size: K.
      different: draw from the K - 1 *other* codes (VA-π's paper) rather than from the whole codebook (reAR and
        the released code of both), where a replaced code keeps its value once in K times.

    Returns:
      (noisy codes, mask of the positions that were replaced).
    """
    mask_key, code_key = jax.random.split(key)
    replaced = jax.random.uniform(mask_key, codes.shape) < rates[:, None]
    if different:
        offsets = jax.random.randint(code_key, codes.shape, 1, codebook_size, codes.dtype)
        drawn = (codes + offsets) % codebook_size
    else:
        drawn = jax.random.randint(code_key, codes.shape, 0, codebook_size, codes.dtype)
    return jnp.where(replaced, drawn, codes), replaced


def drop_labels(key: PRNGKeyArray, labels: Int[Array, " B"], null_label: int, probability: float) -> Int[Array, " B"]:
    """Replaces each label by the null label with the given probability (for classifier-free guidance)."""
    dropped = jax.random.uniform(key, labels.shape) < probability
    return jnp.where(dropped, null_label, labels)
