"""RAR: prediction in random orders that become raster order in the course of training (arXiv 2411.00776)."""

from typing import Any

import jax
from ml_collections import ConfigDict

from rear_jax import orders
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.family import ORDERS
from rear_jax.training.objectives.objective import LossFunction, Objective, conditions_with_drops, draw_each, prediction


def rar_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy of every code given the true codes before it, in orders less and less random."""
    method = config.method

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, order_key, dropout_key = jax.random.split(key, 3)
        conditions = conditions_with_drops(model, config, params, batch, label_key)
        share = orders.random_share(progress, start=method.order_anneal_start, end=method.order_anneal_end)

        def draw(key, codes):
            return orders.draw_orders(key, *codes.shape, share)

        order = draw_each(draw, order_key, batch["number"], batch["codes"])
        codes = orders.reorder(batch["codes"], order)
        dropout = Dropout.of(dropout_key, batch["number"])
        out = model.apply({"params": params}, codes, conditions, order, dropout=dropout)
        loss, metrics = prediction(out.logits, codes)
        return loss, metrics | {"random_share": share}

    return loss_fn


OBJECTIVE = Objective("rar", rar_loss, needs=lambda method: (ORDERS,))
