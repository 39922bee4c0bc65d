"""What tokenizers with one codebook and nearest-neighbour search have in common, whatever their networks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flax import linen as nn

from rear_jax.tokenizers import quantizer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class CodebookTokenizer(nn.Module):
    """The interface `rear_jax.tokenizers.Tokenizer` between an encoder, a codebook and a decoder.

    A subclass has the attributes `image_size`, `codebook_size` and `l2_normalize`, the properties `latent_shape`
    ((h, w) or (N,)) and `embedding_dim`, and a `setup` that makes `encoder` (images in [0, 1] to latents
    [B, *latent_shape, D]), `codebook` and `decoder` (vectors of that shape to images in [0, 1]), whose last layer is
    called `conv_out`, or says otherwise by `last_kernel`.
    """

    @property
    def last_kernel(self) -> tuple[str, ...]:
        """Path of the last layer's kernel among the parameters."""
        return "decoder", "conv_out", "kernel"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes; (1, N) of a sequence."""
        return (1, *self.latent_shape)[-2:]

    @property
    def codes_per_image(self) -> int:
        """N."""
        return math.prod(self.latent_shape)

    @property
    def decoded_size(self) -> int:
        """Pixels along each side of a decoded image; `image_size` unless sizes do not fit together."""
        return self.image_size

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B *n D"]:
        """Latents before quantisation, not normalised."""
        return self.encoder(images)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of images, row by row."""
        codes = quantizer.search(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return codes.reshape(codes.shape[0], -1)

    def embed(self, codes: Int[Array, "*B N"]) -> Float[Array, "*B N D"]:
        """Codebook vectors of codes."""
        return quantizer.look_up(codes, self.codebook, l2_normalize=self.l2_normalize)

    def decode_embeddings(self, vectors: Float[Array, "B *n D"] | Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of codebook vectors or mixtures of them, shaped like latents or as a sequence; unclamped."""
        return self.decoder(vectors.reshape(-1, *self.latent_shape, self.embedding_dim))

    def decode(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images of codes, unclamped."""
        return self.decode_embeddings(self.embed(codes))

    def quantize(self, images: Float[Array, "B H W 3"]) -> quantizer.Quantized:
        """Latents of images, quantised; the arrays lead with [B, *latent_shape]."""
        return quantizer.quantize(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], quantizer.Quantized]:
        """Reconstruction, unclamped, and what quantisation gave."""
        quantized = self.quantize(images)
        return self.decode_embeddings(quantized.vectors), quantized
