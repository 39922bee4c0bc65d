"""Generators: transformers over image codes. A family is a folder whose `FAMILY` is all that others ask for.

`FAMILIES` finds the folders by itself: to add a family, add its folder (docs/extending.md).
"""

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.family import CAPTIONS, TAPS, TOKENS, GeneratorFamily, check_settings, tap_attributes
from rear_jax.generators.stack import HIDDEN
from rear_jax.weights.family import discover, known, network_attributes

FAMILIES: dict[str, GeneratorFamily] = discover(__name__, __path__)


def build(config: ConfigDict, tokenizer: nn.Module, *, needs: Collection[str] = ()) -> nn.Module:
    """The generator that a config describes.

    Args:
      config: the experiment; `config.model` has the `name` of a family and exactly the keys of its section, `dtype` as
        a string such as 'bfloat16'.
      tokenizer: whose codes it is for.
      needs: what it must be able to do, of what families offer; with 'taps' it projects hidden states.

    Raises RearError: the name is unknown, keys are missing from the section or unknown in it, sizes do not fit
      together, or this family or tokenizer cannot do something that is needed.
    """
    model, family = config.model, known(FAMILIES, config.model, "config.model")
    attributes = network_attributes(family, model)
    check_settings(family, config, tokenizer, needs)
    if TAPS in family.offers(model):
        attributes |= tap_attributes(config, tokenizer.embedding_dim, wanted=TAPS in needs)
    sizes = {"codebook_size": tokenizer.codebook_size, "num_codes": tokenizer.codes_per_image}
    return family.network(**attributes | sizes | {"num_classes": config.data.num_classes})


def family_of(network: nn.Module) -> GeneratorFamily:
    """The family that a generator belongs to."""
    return next(family for family in FAMILIES.values() if family.network is type(network))


def cached(network: nn.Module) -> CachedGenerator:
    """The cached form of a generator."""
    return family_of(network).cached(network)


def takes_captions(network: nn.Module) -> bool:
    """Whether the generator is conditioned by features of a text encoder (`interface.Captions`)."""
    return family_of(network).offers_now(network, CAPTIONS)


def reads_tokens(network: nn.Module) -> bool:
    """Whether the generator is conditioned by text that it reads itself (`interface.Tokens`)."""
    return family_of(network).offers_now(network, TOKENS)


def takes_text(network: nn.Module) -> bool:
    """Whether the generator is conditioned by text, as features or as tokens, instead of by a class."""
    return takes_captions(network) or reads_tokens(network)


def shapes(network: nn.Module) -> Any:
    """Shapes of the parameters of a generator."""
    return family_of(network).shapes(network)


def hidden_states(network: nn.Module, params: Any, codes: jax.Array, conditions: Any) -> jax.Array:
    """Hidden states of all layers where codes are read, teacher-forced and without dropout.

    Args:
      network: the generator.
      params: its parameters.
      codes: [B, N], the context.
      conditions: of each sequence.

    Returns:
      [depth + 1, B, N - 1, W] float32: the input of the first block, and the output of every block, at the positions
      that read codes 0 .. N - 2. Each of them predicts the code after the one that it reads.
    """
    _, kept = network.apply({"params": params}, codes, conditions, mutable=[HIDDEN])
    states, others = kept[HIDDEN]["states"][0], codes.shape[1] - 1
    prefix = min(cached(network).prefix_length, states.shape[2] - others)  # of short prompts it is shorter
    return states[:, :, prefix : prefix + others]
