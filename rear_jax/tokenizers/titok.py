"""TiTok: an image as a short sequence of codes without a grid (arXiv 2406.07550).

The published TiTok-S-128, -B-64 and -L-32 (4096 unit-length codes of width 12) do not decode to pixels: their decoder
predicts, for each cell of MaskGIT-VQGAN's 16×16 grid, which of its 1024 codes stands there, and the vectors of these
codes, mixed by the predicted probabilities, go through MaskGIT-VQGAN's decoder. The later `vq8k` networks make pixels
themselves. Parameters, MaskGIT's 30.7M included: 83.7M, 204.8M, 641.1M. Images are in [0, 1].
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from rear_jax.errors import RearError
from rear_jax.tokenizers import blocks, quantizer, vit
from rear_jax.tokenizers.maskgit_vqgan import MaskGitVQGAN

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class PatchDecoder(nn.Module):
    """Codebook vectors to one feature vector per patch: mask tokens ask, the codes answer.

    Attributes:
      side: patches along each side of an image.
      width, depth, heads: of the transformer.
      dtype: of the computation.
    """

    side: int
    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B side side width"]:
        width, patches = self.width, self.side**2
        x = nn.Dense(width, dtype=self.dtype, kernel_init=vit.KERNEL_INIT, name="decoder_embed")(vectors)
        x = x + vit.table(self, "latent_token_positional_embedding", x.shape[1], width).astype(x.dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(width**-0.5), (1, 1, width))
        mask_tokens = jnp.broadcast_to(mask_token[0], (patches, width))
        asking = jnp.concatenate([vit.table(self, "class_embedding", 1, width), mask_tokens])
        asking = asking + vit.table(self, "positional_embedding", patches + 1, width)
        x = jnp.concatenate([vit.repeat(asking, x), x], axis=1)
        transformer = vit.Transformer(
            self.depth, self.heads, dtype=self.dtype, attention_dtype=self.dtype, name="transformer"
        )
        return transformer(x)[:, 1 : patches + 1].reshape(-1, self.side, self.side, width)


class CodePredictor(nn.Module):
    """Logits over the codes of another tokenizer, whose grid has a cell for each patch."""

    trunk: PatchDecoder
    codebook_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B side side K"]:
        x = self.trunk(vectors)
        x = jnp.tanh(vit.pointwise(2 * x.shape[-1], "ffn_0", self.dtype)(x))
        return vit.pointwise(self.codebook_size, "ffn_2", self.dtype)(x).astype(jnp.float32)


class PixelDecoder(nn.Module):
    """Pixels of each patch, then a 3×3 convolution over the seams; images in [0, 1], unclamped, float32."""

    trunk: PatchDecoder
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        x = vit.pointwise(3 * self.patch_size**2, "ffn_0", self.dtype)(self.trunk(vectors))
        x = vit.pixels_of_patches(x, self.trunk.side, self.patch_size)
        return nn.Conv(3, (3, 3), dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)


class TiTok(vit.SequenceTokenizer):
    """The tokenizer; its interface is `rear_jax.tokenizers.Tokenizer`.

    With predicts = 'codes' there are two entries more among its parameters than the interface has, `pixel_codebook` and
    `pixel_decoder`: MaskGIT-VQGAN's, which is called the proxy here, as it stands in for pixels.

    Attributes:
      image_size: pixels along each side; a multiple of patch_size.
      patch_size: pixels along each side of a patch.
      num_latent_tokens: N, codes per image.
      encoder_width, encoder_depth, encoder_heads: of the encoder.
      decoder_width, decoder_depth, decoder_heads: of the transformer that the codes go through.
      codebook_size: number of codes.
      codebook_dim: width of latents and codes.
      l2_normalize: compare and decode vectors of length one; the `vq8k` networks do not.
      legacy_reshape: see `vit.Encoder`; the `vq8k` networks do not.
      predicts: what the decoder gives, 'codes' of MaskGIT-VQGAN or 'pixels'.
      proxy_codebook_size, proxy_dim, proxy_channels, proxy_channel_mult, proxy_res_blocks: sizes of that network, only
        used with predicts = 'codes'. It must have as many cells as there are patches: 2**(levels - 1) = patch_size.
      dtype: of the matrix products; parameters, norms, softmax and distances are float32.

    Raises:
      RearError: the image size is no multiple of the patch size, or `predicts` is neither.
    """

    image_size: int
    patch_size: int
    num_latent_tokens: int
    encoder_width: int
    encoder_depth: int
    encoder_heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    codebook_size: int
    codebook_dim: int
    l2_normalize: bool
    legacy_reshape: bool
    predicts: Literal["codes", "pixels"]
    proxy_codebook_size: int
    proxy_dim: int
    proxy_channels: int
    proxy_channel_mult: tuple[int, ...]
    proxy_res_blocks: int
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.predicts not in ("codes", "pixels"):
            raise RearError(f"tokenizer.predicts {self.predicts!r} is unknown: use codes or pixels")
        super().__post_init__()

    def setup(self) -> None:
        self.encoder = vit.Encoder(
            self.num_latent_tokens,
            self.patch_size,
            self.encoder_width,
            self.encoder_depth,
            self.encoder_heads,
            self.codebook_dim,
            class_token=True,
            legacy_reshape=self.legacy_reshape,
            dtype=self.dtype,
            attention_dtype=self.dtype,
        )
        init = functools.partial(quantizer.codebook_init, l2_normalize=self.l2_normalize)
        self.codebook = self.param("codebook", init, (self.codebook_size, self.codebook_dim))
        trunk = PatchDecoder(
            self.side, self.decoder_width, self.decoder_depth, self.decoder_heads, self.dtype, parent=None
        )
        if self.predicts == "pixels":
            self.decoder = PixelDecoder(trunk, self.patch_size, self.dtype)
            return
        self.decoder = CodePredictor(trunk, self.proxy_codebook_size, self.dtype)
        init = functools.partial(quantizer.codebook_init, l2_normalize=False)
        self.pixel_codebook = self.param("pixel_codebook", init, (self.proxy_codebook_size, self.proxy_dim))
        sizes = self.proxy_channels, self.proxy_channel_mult, self.proxy_res_blocks
        self.pixel_decoder = blocks.Decoder(*sizes, MaskGitVQGAN.coarse_first, self.dtype)

    @property
    def last_kernel(self) -> tuple[str, ...]:
        """Path of the last layer's kernel."""
        return "decoder" if self.predicts == "pixels" else "pixel_decoder", "conv_out", "kernel"

    @property
    def decoded_size(self) -> int:
        """Pixels along each side of a decoded image."""
        return self.image_size if self.predicts == "pixels" else self.side * 2 ** (len(self.proxy_channel_mult) - 1)

    def pixel_logits(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B side side K"]:
        """Logits over the proxy's codes, float32; with predicts = 'pixels' the images themselves."""
        return self.decoder(vectors)

    def decode_embeddings(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of codebook vectors or mixtures of them, unclamped."""
        predicted = self.pixel_logits(vectors)
        if self.predicts == "pixels":
            return predicted
        return self.pixel_decoder(jax.nn.softmax(predicted) @ self.pixel_codebook)
