"""Tokenizers: images to codes and back, one file a family, all behind the interface `base.CodebookTokenizer`.

A family is a file whose `FAMILY` is all that others ask for. `FAMILIES` finds the files by itself: to add a family, add
its file (docs/extending.md).
"""

from typing import Any

from flax import linen as nn
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime.precision import PRECISIONS
from rear_jax.tokenizers.family import TokenizerFamily
from rear_jax.weights.family import discover, known, network_attributes

FAMILIES: dict[str, TokenizerFamily] = discover(__name__, __path__)


def build(config: ConfigDict, image_size: int) -> nn.Module:
    """The tokenizer that a config's `tokenizer` section describes.

    Args:
      config: the section: the `name` of a family and exactly the keys of its section, `dtype` as a string such as
        'bfloat16'.
      image_size: of the data, pixels along each side.

    Raises RearError: no tokenizer has that name, the section lacks an attribute of it or has one too many, the
      precision is unknown, or the image size does not suit it.
    """
    family = known(FAMILIES, config, "config.tokenizer")
    attributes = network_attributes(family, config)
    if attributes.get("precision", PRECISIONS[0]) not in PRECISIONS:
        raise RearError(f"config.tokenizer.precision = {config.precision!r}: use {' or '.join(PRECISIONS)}.")
    made = family.network(**attributes | {"image_size": image_size})
    if made.decoded_size != image_size:
        raise RearError(
            f"tokenizer {config.name!r} would decode images of {image_size} pixels to {made.decoded_size}: "
            f"give tokenizer.patch_size 2 to the power of the levels of tokenizer.proxy_channel_mult but one"
        )
    return made


def family_of(network: nn.Module) -> TokenizerFamily:
    """The family that a tokenizer belongs to."""
    return next(family for family in FAMILIES.values() if family.network is type(network))


def shapes(network: nn.Module) -> Any:
    """Shapes of the parameters of a tokenizer."""
    return family_of(network).shapes(network)
