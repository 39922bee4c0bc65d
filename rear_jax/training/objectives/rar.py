"""RAR: prediction in random orders that become raster order in the course of training (arXiv 2411.00776)."""

from typing import Any

import jax
from ml_collections import ConfigDict

from rear_jax import noise, orders
from rear_jax.generators.family import ORDERS
from rear_jax.training.objectives.objective import LossFunction, Objective, prediction


def rar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it, in orders less and less random."""
    method = config.method

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, order_key, dropout_key = jax.random.split(key, 3)
        labels = noise.drop_labels(label_key, batch["label"], model.num_classes, method.label_drop)
        share = orders.random_share(progress, start=method.order_anneal_start, end=method.order_anneal_end)
        order = orders.draw_orders(order_key, *batch["codes"].shape, share)
        codes = orders.reorder(batch["codes"], order)
        out = model.apply({"params": params}, codes, labels, order, train=True, rngs={"dropout": dropout_key})
        loss, metrics = prediction(out.logits, codes)
        return loss, metrics | {"random_share": share}

    return loss_fn


OBJECTIVE = Objective("rar", rar_loss, needs=lambda method: (ORDERS,))
