"""The record of a tokenizer family."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from rear_jax.runtime.sharding import Rule, Rules
from rear_jax.weights.family import Family

PARAMETERS: Rules = (  # of encoders, decoders and codebooks
    Rule(r"(^|/)(patch_embed|decoder_embed)/kernel$", ("fsdp",)),
    Rule(r"(^|/)(encoder|(pixel_)?decoder)/.*kernel$", ("fsdp",), decays=True),
    Rule(r"(^|/)(encoder|(pixel_)?decoder)/.*(scale|bias)$"),
    Rule(r"(^|/)(encoder|decoder)/.*(embedding|latent_tokens|mask_token)$", ("fsdp",)),
    Rule(r"(^|/)(pixel_)?codebook$"),
)


@dataclasses.dataclass(frozen=True)
class TokenizerFamily(Family):
    """All there is to know of a family of tokenizers; its module is a `base.CodebookTokenizer`.

    Attributes:
      of_decoder: how the settings begin that the encoder and the codebook do not depend on.
      proxy: (section) -> the section of the tokenizer whose codes this one learns to predict first, None where it
        predicts none.
    """

    KIND: ClassVar[str] = "tokenizer"
    SECTION: ClassVar[str] = "tokenizer"

    derived: tuple[str, ...] = ("image_size",)
    of_decoder: tuple[str, ...] = ()
    proxy: Callable[[Mapping[str, Any]], ConfigDict | None] = lambda section: None

    def shapes(self, network: nn.Module) -> Any:
        """Shapes of the parameters of one of its tokenizers."""
        image = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
        return jax.eval_shape(network.init, jax.random.key(0), image)["params"]
