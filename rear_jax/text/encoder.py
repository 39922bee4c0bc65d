"""Captions to the features that text-conditional LlamaGen reads: cleaned, split, encoded, and moved to the right.

LlamaGen encodes captions that are padded on the right, and then moves their features to the right end, next to the
first code of the image.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rear_jax.errors import RearError
from rear_jax.runtime.identity import fingerprint
from rear_jax.runtime.precision import products_at
from rear_jax.text import cleaning, t5_files
from rear_jax.text.t5 import T5Encoder
from rear_jax.text.vocabulary import LENGTH, T5Vocabulary


def right_aligned(
    hidden: Float[Array, "B T W"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
    """Moves the rows under the mask, in their order, to the right end; the rows before them are zero.

    Args:
      hidden: features of tokens.
      mask: True on tokens, wherever they are.

    Returns:
      The moved features, and their mask.
    """
    order = jnp.argsort(mask, axis=1, stable=True)
    hidden = jnp.where(mask[..., None], hidden, 0.0)
    return jnp.take_along_axis(hidden, order[..., None], axis=1), jnp.take_along_axis(mask, order, axis=1)


def caption_features(
    module: T5Encoder, params: Any, ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
    """Features of tokens, float32 and zero on padding, and their mask; both at the right end.

    Args:
      module: the network.
      params: its weights.
      ids, mask: as `TextEncoder.tokens` gives them.
    """
    with products_at("highest"):
        hidden = module.apply({"params": params}, ids, mask)
    return right_aligned(hidden, mask)


class TextEncoder:
    """T5 with its vocabulary, on the devices that jax takes by default.

    Attributes:
      module: the network.
      params: its weights on the host, numpy in `dtype`.
      vocabulary: of the network.
      length: T, tokens of a caption with the end token.
      fingerprint: sixteen hexadecimal digits that name all that decides the features.
    """

    def __init__(self, weights: str, vocabulary: str, *, length: int = LENGTH, dtype: Any = "bfloat16"):
        """Reads both files.

        Args:
          weights: see `t5_files.load`.
          vocabulary: T5's tokenizer.json or spiece.model.
          length: T.
          dtype: of the weights and of the products, bfloat16 or float32.

        Raises RearError: a file is missing, damaged or of another network, the files are not of one network, or T5
          does not compute in `dtype`.
        """
        self.vocabulary, self.length = T5Vocabulary(vocabulary), length
        self.vocabulary.encode([""], length)  # refuses a length before the weights are read
        self.module, self.params, of_weights = t5_files.load(weights, dtype)
        if self.vocabulary.size > self.module.vocabulary_size:
            raise RearError(
                f"{vocabulary} has {self.vocabulary.size} tokens, and {weights} knows {self.module.vocabulary_size}: "
                "give the vocabulary of that network."
            )
        self.fingerprint = fingerprint(
            {},
            {
                "weights": of_weights,
                "vocabulary": self.vocabulary.fingerprint,
                "length": length,
                "dtype": self.module.dtype.name,
                "cleaning": cleaning.VERSION,
            },
        )

    def encode(self, captions: Sequence[str]) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
        """Features of captions, float32 and zero on padding, and the mask of their tokens; padding is on the left.

        Each number of captions is compiled once.

        Raises RearError: there are none.
        """
        if not captions:
            raise RearError("There are no captions to encode: give at least one.")
        return self._encode(self._placed, *self.tokens(captions))

    def tokens(self, captions: Sequence[str]) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        """Ids int32 and mask of captions, cleaned and padded on the right, as `features` takes them."""
        return self.vocabulary.encode([cleaning.clean(caption) for caption in captions], self.length)

    def features(
        self, params: Any, ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T W"], Bool[Array, "B T"]]:
        """What `encode` gives, as a pure function of weights and tokens, see `caption_features`."""
        return caption_features(self.module, params, ids, mask)

    @functools.cached_property
    def _placed(self) -> Any:
        return jax.device_put(self.params)

    @functools.cached_property
    def _encode(self) -> Any:
        return jax.jit(self.features)
