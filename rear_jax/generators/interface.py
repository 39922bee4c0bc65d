"""What the families of generators share: their settings, what goes into them, and what comes out."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Captions(NamedTuple):
    """Text conditions, padded on the left.

    Attributes:
      features: [B, T, D] of a text encoder (T5 in LlamaGen's published models).
      mask: [B, T] bool, False on padding.
    """

    features: jax.Array
    mask: jax.Array


class Tokens(NamedTuple):
    """Text as numbers of words: what a text encoder reads, and a generator that reads text itself.

    Attributes:
      ids: [B, T] int32.
      mask: [B, T] bool, False on padding.
    """

    ids: jax.Array
    mask: jax.Array


class Features(NamedTuple):
    """What a generator returns for whole sequences.

    Attributes:
      logits: [B, N, K] float32; entry n is the prediction of code n from the codes before it.
      shallow: [B, N, D] projection of the shallow layer at the position that reads code n, or None.
      deep: [B, N, D] projection of the deep layer at the position that predicts code n, or None.
    """

    logits: jax.Array
    shallow: jax.Array | None = None
    deep: jax.Array | None = None


class Generator(nn.Module):
    """The attributes of every transformer here; a family says what `dropout` is the rate of.

    Attributes:
      codebook_size: K; codes are 0..K-1.
      num_classes: labels are 0..num_classes-1; `num_classes` itself is the null label.
      num_codes: N, codes per image.
      width, depth, heads, mlp_width: of the transformer.
      dropout: rate.
      dtype: of the matrix products; parameters, residual stream, normalisation and softmax are float32.
      attention: the kernel of whole sequences, one of `attention_kernels.KERNELS`.
      remat: what the backward pass computes anew instead of reading it, a key of `stack.REMAT`.
      unroll: how many blocks of the layer scan are compiled side by side (`depth` = no loop at all).
    """

    codebook_size: int
    num_classes: int
    num_codes: int
    width: int = 768
    depth: int = 24
    heads: int = 16
    mlp_width: int = 3072
    dropout: float = 0.1
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "auto"
    unroll: int = 1


class TappedGenerator(Generator):
    """A generator that can project hidden states of two layers into the codebook's space.

    Attributes:
      projector: 'none' (no projections, no taps), or a key of `layers.PROJECTORS`: 'released' (3 layers, SiLU) or
        'paper' (2 layers, GELU).
      projector_width: hidden width of the projectors.
      embedding_dim: D, width of the codebook's vectors.
      shallow_layer, deep_layer: 0-based index of the blocks whose output is projected.
    """

    projector: str = "none"
    projector_width: int = 2048
    embedding_dim: int = 256
    shallow_layer: int = 0
    deep_layer: int = 0

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks whose output is wanted."""
        return () if self.projector == "none" else (self.shallow_layer, self.deep_layer)
