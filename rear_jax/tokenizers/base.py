"""What tokenizers with one codebook and nearest-neighbour search have in common, whatever their networks."""

import math

from flax import linen as nn
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from rear_jax.runtime.precision import PRECISIONS, products_at
from rear_jax.tokenizers import quantizer


class CodebookTokenizer(nn.Module):
    """What every tokenizer offers: an encoder, a codebook with nearest-neighbour search, and a decoder.

    Images are [B, H, W, 3] floats in [0, 1] at this interface, whatever range the network was trained on: converting
    is the tokenizer's business. H = W = `image_size`. Codes are [B, N] int32 in [0, codebook_size), in the order in
    which the published generators read them: row by row, for tokenizers with a grid.

    The methods run under `tokenizer.apply({"params": params}, x, method=tokenizer.encode)`, draw no random numbers and
    keep no state beside the parameters; `init` wants one batch of images. The parameter tree has the entries `encoder`,
    `decoder` and `codebook` ([codebook_size, embedding_dim], raw); what else it has belongs to the decoder. The
    properties need no parameters.

    A subclass has the attributes `image_size` (pixels along each side), `codebook_size` (K), `codebook_dim` (D, or the
    property `embedding_dim`) and `l2_normalize`, the property `latent_shape` ((h, w) or (N,)), and a `setup` that makes
    `encoder` (images in [0, 1] to latents [B, *latent_shape, D]), `codebook` and `decoder` (vectors of that shape to
    images in [0, 1]), whose last layer is called `conv_out`, or says otherwise by `last_kernel`. It may make a setting
    of `precision`, that of its products where they are of float32.
    """

    precision = PRECISIONS[0]

    @property
    def last_kernel(self) -> tuple[str, ...]:
        """Path among the parameters of the last layer's kernel, where adversaries are weighed."""
        return "decoder", "conv_out", "kernel"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of latents; (1, N) where they form a sequence."""
        return (1, *self.latent_shape)[-2:]

    @property
    def embedding_dim(self) -> int:
        """D, the width of a codebook vector."""
        return self.codebook_dim

    @property
    def codes_per_image(self) -> int:
        """N, the length of an image's code sequence."""
        return math.prod(self.latent_shape)

    @property
    def decoded_size(self) -> int:
        """Pixels along each side of a decoded image: `image_size` of every tokenizer that `build` returns."""
        return self.image_size

    def latents(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B *n D"]:
        """Encoder output before quantisation, float32; not normalised, even if the search will do so.

        *n is (h, w) on a grid and (N,) in a sequence.
        """
        with products_at(self.precision):
            return self.encoder(images)

    def encode(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B N"]:
        """Codes of images: the nearest codebook vector of each latent, compared in float32."""
        codes = quantizer.search(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)
        return codes.reshape(codes.shape[0], -1)

    def embed(self, codes: Int[Array, "*B N"]) -> Float[Array, "*B N D"]:
        """Codebook vectors of codes as the decoder sees them: of length one where the tokenizer normalises."""
        return quantizer.look_up(codes, self.codebook, l2_normalize=self.l2_normalize)

    def decode_embeddings(self, vectors: Float[Array, "B *n D"] | Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of vectors in the space of `embed`, or mixtures of them, unclamped; differentiable in the vectors.

        `decode(codes)` = `decode_embeddings(embed(codes))`; straight-through estimators build on it.
        """
        with products_at(self.precision):
            return self.decoder(vectors.reshape(-1, *self.latent_shape, self.embedding_dim))

    def decode(self, codes: Int[Array, "B N"]) -> Float[Array, "B H W 3"]:
        """Images of codes, float32, not clamped to [0, 1]."""
        return self.decode_embeddings(self.embed(codes))

    def quantize(self, images: Float[Array, "B H W 3"]) -> quantizer.Quantized:
        """Latents of images, quantised; the arrays lead with [B, *latent_shape]."""
        return quantizer.quantize(self.latents(images), self.codebook, l2_normalize=self.l2_normalize)

    def make_codebook(self, init: Initializer = quantizer.codebook_init) -> Float[Array, "K D"]:
        """The parameter `codebook`, for `setup`."""
        return self.param("codebook", init, (self.codebook_size, self.embedding_dim))

    def __call__(self, images: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B H W 3"], quantizer.Quantized]:
        """For training: the reconstruction, unclamped, and what quantisation gave (its arrays lead with [B, *n])."""
        quantized = self.quantize(images)
        return self.decode_embeddings(quantized.vectors), quantized
