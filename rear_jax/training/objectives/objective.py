"""The record of an objective, and the prediction that all objectives share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import losses

LossFunction = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Objective(NamedTuple):
    """How a generator learns from codes.

    Attributes:
      name: in `config.method.name`.
      loss: (generator, config) -> loss(params, batch, key, *, progress, codebook) -> (scalar, metrics), where a batch
        has 'codes' [B, N] and 'label' [B], progress is the share of the steps, and the codebook is [K, D].
      needs: (config.method) -> what the generator must offer, of `generators.family`.
    """

    name: str
    loss: Callable[[Any, ConfigDict], LossFunction]
    needs: Callable[[ConfigDict], tuple[str, ...]]


def prediction(logits: jax.Array, codes: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of codes [B, N] under logits [B, N, K], and its metrics."""
    cross_entropy = jnp.mean(losses.next_code_cross_entropy(logits, codes))
    correct = jnp.mean(losses.correct_codes(logits, codes))
    return cross_entropy, {"loss": cross_entropy, "cross_entropy": cross_entropy, "correct_codes": correct}
