"""The networks of post-training, and the teacher-forced pass.

A generator reads an image's own codes, perhaps with noise, and predicts each of them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import generators, grpo, losses, noise

READINGS = {"paper": True, "released": False}  # noise: is a replaced code always a different one?


class Networks(NamedTuple):
    """The modules that play a part.

    `frozen`, in the steps, has the parameters of those that do not learn: 'tokenizer', 'generator' where the decoder
    learns, and each judge under its name. Where a KL term compares with the generator that training started from,
    'reference' has its parameters.

    Attributes:
      generator, tokenizer: see `generators` and `tokenizers`.
      judges: networks by their names in `judges.JUDGES`, those alone that a reward asks.
    """

    generator: Any
    tokenizer: Any
    judges: Mapping[str, Any] = {}


def bare_generator(config: ConfigDict, tokenizer: Any) -> Any:
    """The config's generator without what only `--job=train` needs: it projects no hidden states."""
    return generators.build(config, tokenizer)


class Context(NamedTuple):
    """What a teacher-forced pass reads of each image: its codes [B, N], the same with noise [B, N], its condition."""

    codes: jax.Array
    noisy: jax.Array
    condition: Any


def unit_images(batch: dict) -> jax.Array:
    """The batch's images as floats in [0, 1]."""
    return batch["image"].astype(jnp.float32) / 255.0


def read_context(networks: Networks, settings: ConfigDict, frozen: dict, batch: dict, key: jax.Array) -> Context:
    """Codes of a batch's images; each is replaced with probability ξ in what the generator reads."""
    tokenizer = networks.tokenizer
    codes = tokenizer.apply({"params": frozen["tokenizer"]}, unit_images(batch), method="encode")
    rates = jnp.full(len(codes), settings.noise_rate)
    noisy, _ = noise.corrupt(key, codes, rates, tokenizer.codebook_size, different=READINGS[settings.noise_reading])
    return Context(codes, noisy, batch["condition"])


def predict(networks: Networks, params: Any, context: Context) -> jax.Array:
    """Teacher-forced logits [B, N, K]; no dropout and no dropped conditions."""
    return networks.generator.apply({"params": params}, context.noisy, context.condition).logits


def cross_entropy(networks: Networks, params: Any, context: Context, *, conditional: bool = True) -> jax.Array:
    """Mean cross-entropy of the images' own codes, given their conditions or without."""
    if not conditional:
        family = generators.family_of(networks.generator)
        context = context._replace(condition=family.unconditional(networks.generator, params, context.condition))
    return jnp.mean(losses.next_code_cross_entropy(predict(networks, params, context), context.codes))


def prior(
    networks: Networks, settings: ConfigDict, params: Any, logits: jax.Array, context: Context, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the images' own codes, and its terms by name: (1 - p)·conditional + p·unconditional.

    With p = `label_drop` that is what dropping each condition with probability p gives on average. The conditional part
    is of all `logits` [B, N, K]; the unconditional one takes a forward pass of its own, over `dropped_rows` random
    images. So samples and their probabilities stay conditional, and ρ stays 1 at the first update.
    """
    conditional = jnp.mean(losses.next_code_cross_entropy(logits, context.codes))
    if not (settings.label_drop and settings.prior_weight):
        return conditional, {"prior": conditional}
    rows = jax.random.choice(key, len(logits), (dropped_rows(settings.label_drop, len(logits)),), replace=False)
    some = jax.tree.map(lambda x: x[rows], context)
    unconditional = cross_entropy(networks, params, some, conditional=False)
    mixed = (1.0 - settings.label_drop) * conditional + settings.label_drop * unconditional
    return mixed, {"prior": conditional, "prior_unconditional": unconditional}


def dropped_rows(share: float, rows: int) -> int:
    """A share of so many rows, rounded up to a power of two that devices divide, but not to more than there are."""
    return min(rows, 2 ** math.ceil(math.log2(max(1.0, share * rows))))


def draw_samples(
    networks: Networks, config: ConfigDict, params: Any, frozen: dict, batch: dict, key: jax.Array
) -> jax.Array:
    """G code sequences [B, G, N] for each image, every code drawn given the image's own codes before it."""
    noise_key, sample_key = jax.random.split(key)
    context = read_context(networks, config.posttrain, frozen, batch, noise_key)
    return grpo.draw_groups(sample_key, predict(networks, params, context), config.posttrain.group)
