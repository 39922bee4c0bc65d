"""Tokenizer post-training: the decoder learns what the generator samples (a baseline in arXiv 2512.19680).

The generator, the encoder and the codebook stay, so that codes keep their meaning; the tokenizer's decoder learns to
decode teacher-forced samples of an image to that image.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax.runtime.mesh import map_rows
from rear_jax.training.posttraining import rewards
from rear_jax.training.posttraining.method import Method, descent_step
from rear_jax.training.posttraining.teacher_forcing import Networks, draw_samples, unit_images


def make_step(networks: Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state of {'decoder': ...}, batch, key, frozen with 'tokenizer', 'generator' and what rewards need)."""
    settings = config.posttrain

    def loss_fn(params: Any, batch: dict, key: jax.Array, frozen: dict):
        samples = draw_samples(networks, config, frozen["generator"], frozen, batch, key)

        @jax.checkpoint
        def of_one_image(inputs):
            codes, image, label, text_features = inputs
            variables = {"params": frozen["tokenizer"] | params}
            decoded = networks.tokenizer.apply(variables, codes, method="decode")
            seen = rewards.Seen(networks, frozen, codes, image[None], text_features)
            return rewards.total(settings, decoded, jnp.full(len(codes), label), seen)

        inputs = samples, unit_images(batch), batch["label"], rewards.text_features_of(batch)
        reward, each = map_rows(of_one_image, inputs, at_once=settings.images_at_once)
        loss = -jnp.mean(reward)
        return loss, {"loss": loss} | rewards.watched(reward, each, batch)

    return descent_step(config, optimizer, loss_fn)


METHOD = Method(
    trains="decoder",
    make_step=make_step,
    draw_samples=draw_samples,
    reads=("noise_rate",),
    lacks={rewards.CODES: "looks at codes, which a decoder does not change"},
)
