"""reAR: a noisy context, and hidden states that predict codebook embeddings (arXiv 2510.04450)."""

from typing import Any

import chex
import jax
from ml_collections import ConfigDict

from rear_jax import losses, noise
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.family import TAPS
from rear_jax.training.objectives.objective import LossFunction, Objective, conditions_with_drops, draw_each, prediction

TERMS = {"both": ("shallow", "deep"), "shallow": ("shallow",), "deep": ("deep",)}  # those that count


def rear_loss(model: Any, config: ConfigDict) -> LossFunction:
    """Cross-entropy under a noisy context, plus λ times the codebook-embedding terms that count."""
    method = config.method

    def loss_fn(params, batch, key, *, progress, codebook):
        label_key, noise_key, dropout_key = jax.random.split(key, 3)
        codes = batch["codes"]
        conditions = conditions_with_drops(model, config, params, batch, label_key)

        def draw(key, codes):
            rate_key, code_key = jax.random.split(key)
            rates = noise.noise_rates(rate_key, method.noise_schedule, progress, len(codes), rate=method.noise_rate)
            return noise.corrupt(code_key, codes, rates, model.codebook_size)

        noisy, replaced = draw_each(draw, noise_key, batch["number"], codes)
        dropout = Dropout.of(dropout_key, batch["number"])
        out = model.apply({"params": params}, noisy, conditions, dropout=dropout)
        loss, metrics = prediction(out.logits, codes)
        metrics["noise"] = replaced.mean()
        if out.shallow is not None:
            targets = codebook[codes]
            chex.assert_equal_shape([out.shallow, out.deep, targets])
            terms = losses.codebook_embedding_losses(
                out.shallow, out.deep, targets, replaced, reading=method.embedding_reading
            )
            loss += method.embedding_weight * sum(getattr(terms, name) for name in TERMS[method.embedding_terms])
            metrics |= {"shallow": terms.shallow, "deep": terms.deep, "loss": loss}
        return loss, metrics

    return loss_fn


OBJECTIVE = Objective("rear", rear_loss, needs=lambda method: (TAPS,) if method.embedding_weight > 0 else ())
