"""Straight-through post-training: the decoder's gradient flows into the logits (a baseline in arXiv 2512.19680).

Forward, each position decodes the vector of its most probable code; backward, that of softmax(logits / τ). The vectors
are those that decoding uses, normalised where the tokenizer normalises. VA-π's prior, the cross-entropy of the
image's own codes, is added with the same default weight; `config.posttrain.prior_weight = 0` leaves it out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax import grpo
from rear_jax.runtime.mesh import map_rows
from rear_jax.training.posttraining import rewards
from rear_jax.training.posttraining.method import Method, descent_step
from rear_jax.training.posttraining.teacher_forcing import (
    Networks,
    draw_samples,
    predict,
    prior,
    read_context,
    unit_images,
)


def make_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state, batch, key, frozen with 'tokenizer' and what rewards need)."""
    settings = config.posttrain

    def loss_fn(params: Any, batch: dict, key: jax.Array, frozen: dict):
        context = read_context(networks, settings, frozen, batch, key)
        logits = predict(networks, params, context)
        reward, each = reconstruction(networks, settings, frozen, logits, batch)
        own_codes, terms = prior(networks, settings, params, logits, context, jax.random.fold_in(key, 1))
        loss = settings.prior_weight * own_codes - jnp.mean(reward)
        metrics = terms | {"loss": loss, "entropy": grpo.entropy(logits)}
        return loss, metrics | rewards.watched(reward[:, None], each, batch)

    return descent_step(config, optimizer, loss_fn)


def reconstruction(
    networks: Networks, settings: ConfigDict, frozen: dict, logits: jax.Array, batch: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rewards [B] of what logits [B, N, K] decode to, and each by name; their gradient is the straight-through one."""
    tokenizer, variables = networks.tokenizer, {"params": frozen["tokenizer"]}
    every = jnp.arange(tokenizer.codebook_size)[None]
    vectors = tokenizer.apply(variables, every, method="embed")[0]  # [K, D]

    @jax.checkpoint
    def of_one_image(inputs):
        logits, image, label, text_features = inputs
        chosen = straight_through(logits, settings.ste_temperature)
        mixed = jnp.matmul(chosen, vectors, precision="highest")  # [N, D], each a code's vector to the last digit
        decoded = tokenizer.apply(variables, mixed[None], method="decode_embeddings")
        seen = rewards.Seen(networks, frozen, None, image[None], text_features)
        return rewards.total(settings, decoded, label[None], seen)

    inputs = logits, unit_images(batch), batch["label"], rewards.text_features_of(batch)
    reward, each = map_rows(of_one_image, inputs, at_once=settings.images_at_once)
    return reward[:, 0], each


def straight_through(logits: jax.Array, temperature: float) -> jax.Array:
    """One-hot argmax of logits [..., K] in float32, with the gradient of softmax(logits / temperature)."""
    soft = jax.nn.softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return hard + (soft - jax.lax.stop_gradient(soft))


METHOD = Method(
    trains="generator",
    make_step=make_step,
    draw_samples=draw_samples,
    reads=("noise_rate", "label_drop", "ste_temperature"),
    lacks={rewards.CODES: "looks at codes, and 'ste' decodes mixtures of them"},
)
