"""Tokenizer post-training: the decoder learns what the generator samples (a baseline in arXiv 2512.19680).

The generator, the encoder and the codebook stay, so that codes keep their meaning; the tokenizer's decoder learns to
decode teacher-forced samples of an image to that image.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rear_jax.training.loop import SUSPECT
from rear_jax.training.mesh import map_rows
from rear_jax.training.posttraining import parts, policy, rewards

TRAINS = "decoder"
draw_samples = parts.teacher_forced_samples


def check(config: ConfigDict) -> None:
    """Raises RearError where `config.posttrain` cannot work."""
    parts.check(config.posttrain, unread=policy.SETTINGS)
    rewards.refuse(config.posttrain, rewards.READS_CODES, "looks at codes, which a decoder does not change")


def make_step(networks: parts.Networks, config: ConfigDict, optimizer: optax.GradientTransformation):
    """step(state of {'decoder': ...}, batch, key, frozen with 'tokenizer', 'generator' and what rewards need)."""
    settings = config.posttrain
    check(config)

    def loss_fn(params: Any, batch: dict, key: jax.Array, frozen: dict):
        samples = draw_samples(networks, config, frozen["generator"], frozen, batch, key)

        @jax.checkpoint
        def of_one_image(inputs):
            codes, image, label = inputs
            variables = {"params": frozen["tokenizer"] | params}
            decoded = networks.tokenizer.apply(variables, codes, method="decode")
            seen = rewards.Seen(networks, frozen, codes, image[None])
            return rewards.total(settings, decoded, jnp.full(len(codes), label), seen)

        inputs = samples, parts.unit_images(batch), batch["label"]
        reward, by_name = map_rows(of_one_image, inputs, at_once=settings.images_at_once)
        loss = -jnp.mean(reward)
        watched = {"loss": loss, "reward": jnp.mean(reward), SUSPECT: parts.first_not_finite(reward, batch)}
        return loss, watched | {f"reward_{name}": jnp.mean(part) for name, part in by_name.items()}

    return parts.descent_step(config, optimizer, loss_fn)
