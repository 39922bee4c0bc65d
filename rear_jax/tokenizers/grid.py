"""What tokenizers with a square grid of nearest-neighbour codes have in common, whatever their networks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flax import linen as nn

from rear_jax.errors import RearError
from rear_jax.tokenizers import quantizer

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int


class GridTokenizer(nn.Module):
    """The interface `rear_jax.tokenizers.Tokenizer` between an encoder, a codebook and a decoder.

    A subclass has the attributes `image_size`, `channel_mult` (one entry for each resolution), `codebook_size` and
    `l2_normalize`, the property `embedding_dim`, and a `setup` that makes `encoder` (images in [0, 1] to latents),
    `codebook` and `decoder` (vectors to images in [0, 1], unclamped), whose last layer is called `conv_out`.

    Raises:
      RearError: the image size cannot be halved as often as the levels ask.
    """

    def __post_init__(self) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % factor:
            raise RearError(
                f"data.image_size {self.image_size} is not a multiple of {factor}: "
                f"change it, or give tokenizer.channel_mult another number of levels than {len(self.channel_mult)}"
            )
        super().__post_init__()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        side = self.image_size // 2 ** (len(self.channel_mult) - 1)
        return side, side

    @property
    def codes_per_image(self) -> int:
        """N."""
        return math.prod(self.grid)

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Latents before quantisation, not normalised."""
        return self.encoder(images)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of images, row by row."""
        codes = quantizer.search(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return codes.reshape(codes.shape[0], -1)

    def embed(self, codes: Int[Array, "*B N"]) -> Float[Array, "*B N D"]:
        """Codebook vectors of codes."""
        return quantizer.look_up(codes, self.codebook, l2_normalize=self.l2_normalize)

    def decode_embeddings(self, vectors: Float[Array, "B h w D"] | Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of codebook vectors or mixtures of them, as a grid or as a sequence; unclamped."""
        return self.decoder(vectors.reshape(-1, *self.grid, self.embedding_dim))

    def decode(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images of codes, unclamped."""
        return self.decode_embeddings(self.embed(codes))

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], quantizer.Quantized]:
        """Reconstruction, unclamped, and what quantisation gave, on the grid [B, h, w, ...]."""
        quantized = quantizer.quantize(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return self.decode_embeddings(quantized.vectors), quantized
