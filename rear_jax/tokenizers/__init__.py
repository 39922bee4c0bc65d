"""Tokenizers: images to codes and back, one file each, all behind the interface `Tokenizer`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import jax.numpy as jnp

from rear_jax.errors import RearError
from rear_jax.tokenizers.alitok import AliTok
from rear_jax.tokenizers.llamagen_vq import LlamaGenVQ
from rear_jax.tokenizers.maskgit_vqgan import MaskGitVQGAN
from rear_jax.tokenizers.quantizer import Quantized
from rear_jax.tokenizers.titok import TiTok
from rear_jax.tokenizers.vqgan_plus import VQGANPlus

if TYPE_CHECKING:
    import ml_collections
    from flax import linen as nn
    from jaxtyping import Array, Float, Int


class Tokenizer(Protocol):
    """What every tokenizer offers; each is a Flax linen module.

    Images are [B, H, W, 3] floats in [0, 1] at this interface, whatever range the network was trained on: converting
    is the tokenizer's business. H = W = `image_size`. Codes are [B, N] int32 in [0, codebook_size), in the order in
    which the published generators read them: row by row, for tokenizers with a grid.

    The methods run under `tokenizer.apply({"params": params}, x, method=tokenizer.encode)`, draw no random numbers and
    keep no state beside the parameters; `init` wants one batch of images. The parameter tree has the entries `encoder`,
    `decoder` and `codebook` ([codebook_size, embedding_dim], raw); what else it has belongs to the decoder. The
    properties need no parameters.

    Attributes:
      image_size: pixels along each side.
      codebook_size: K, the number of codes.
    """

    image_size: int
    codebook_size: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latents; (1, N) where the latents form a sequence."""

    @property
    def codes_per_image(self) -> int:
        """N, the length of an image's code sequence."""

    @property
    def embedding_dim(self) -> int:
        """D, the width of a codebook vector."""

    @property
    def decoded_size(self) -> int:
        """Pixels along each side of a decoded image: `image_size` of every tokenizer that `build` returns."""

    @property
    def last_kernel(self) -> tuple[str, ...]:
        """Path among the parameters of the last layer's kernel, where adversaries are weighed."""

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B *n D"]:
        """Encoder output before quantisation, float32; not normalised, even if the search will do so.

        *n is (h, w) on a grid and (N,) in a sequence.
        """

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of images: the nearest codebook vector of each latent, compared in float32."""

    def embed(self, codes: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """Codebook vectors of codes as the decoder sees them: of length one where the tokenizer normalises."""

    def decode(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images of codes, float32, not clamped to [0, 1]."""

    def decode_embeddings(self, vectors: Float[Array, "B *n D"] | Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of vectors in the space of `embed`, unclamped: `decode(codes)` = `decode_embeddings(embed(codes))`.

        Differentiable in the vectors, which straight-through estimators build on.
        """

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], Quantized]:
        """For training: the reconstruction, unclamped, and what quantisation gave (its arrays lead with [B, *n])."""


TOKENIZERS: dict[str, type[nn.Module]] = {
    "maskgit_vqgan": MaskGitVQGAN,
    "vqgan_plus": VQGANPlus,
    "llamagen_vq": LlamaGenVQ,
    "titok": TiTok,
    "alitok": AliTok,
}


def build(config: ml_collections.ConfigDict, image_size: int) -> nn.Module:
    """The tokenizer that a config's `tokenizer` section describes.

    Args:
      config: `name`, a key of TOKENIZERS, and every other attribute of that module under the attribute's own name;
        `dtype` as a string such as 'bfloat16'.
      image_size: of the data, pixels along each side.

    Raises:
      RearError: no tokenizer has that name, the section lacks an attribute of it or has one too many, or the image size
        does not suit it.
    """
    if config.name not in TOKENIZERS:
        raise RearError(f"tokenizer.name {config.name!r} is unknown: use one of {', '.join(sorted(TOKENIZERS))}")
    module = TOKENIZERS[config.name]
    wanted = {field.name for field in dataclasses.fields(module)} - {"name", "parent", "image_size"}
    given = {key: config[key] for key in config if key != "name"}
    if wanted != set(given):
        wrong = ", ".join(sorted(wanted ^ set(given)))
        raise RearError(f"tokenizer {config.name!r} takes exactly the keys {', '.join(sorted(wanted))}: mend {wrong}")
    given = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in given.items()}
    made = module(**given | {"image_size": image_size, "dtype": jnp.dtype(config.dtype)})
    if made.decoded_size != image_size:
        raise RearError(
            f"tokenizer {config.name!r} would decode images of {image_size} pixels to {made.decoded_size}: "
            f"give tokenizer.patch_size 2 to the power of the levels of tokenizer.proxy_channel_mult but one"
        )
    return made
