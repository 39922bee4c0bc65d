"""AR: the cross-entropy of every code given the true codes before it."""

from typing import Any

import jax
from ml_collections import ConfigDict

from rear_jax.generators.dropout import Dropout
from rear_jax.training.objectives.objective import LossFunction, Objective, conditions_with_drops, prediction


def ar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it."""

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, dropout_key = jax.random.split(key)
        conditions = conditions_with_drops(model, config, params, batch, label_key)
        dropout = Dropout.of(dropout_key, batch["number"])
        out = model.apply({"params": params}, batch["codes"], conditions, dropout=dropout)
        return prediction(out.logits, batch["codes"])

    return loss_fn


OBJECTIVE = Objective("ar", ar_loss, needs=lambda method: ())
