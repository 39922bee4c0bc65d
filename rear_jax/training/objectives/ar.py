"""AR: the cross-entropy of every code given the true codes before it."""

from typing import Any

import jax
from ml_collections import ConfigDict

from rear_jax import noise
from rear_jax.training.objectives.objective import LossFunction, Objective, prediction


def ar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it."""

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, dropout_key = jax.random.split(key)
        labels = noise.drop_labels(label_key, batch["label"], model.num_classes, config.method.label_drop)
        out = model.apply({"params": params}, batch["codes"], labels, train=True, rngs={"dropout": dropout_key})
        return prediction(out.logits, batch["codes"])

    return loss_fn


OBJECTIVE = Objective("ar", ar_loss, needs=lambda method: ())
