"""AliTok: codes whose order a left-to-right generator can follow (arXiv 2506.05289).

The encoder sees the whole image and gives 17 prefix codes and one code per patch, row by row. It was trained against a
decoder that draws patch i from the prefix and the codes up to i alone, which forces that order upon the codes; the
published file holds the decoder that was trained afterwards, in which everything sees everything, after 32 buffer
tokens. 389.9M parameters (ViT-B encoder, ViT-L decoder, 4096 codes of width 32), 273 codes of 256×256 pixels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rear_jax.runtime.precision import Linear
from rear_jax.tokenizers import vit
from rear_jax.tokenizers.family import PARAMETERS, TokenizerFamily
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout


class Decoder(nn.Module):
    """Codebook vectors to images in [0, 1] by a sigmoid, float32.

    Attributes:
      side: patches along each side of an image; the last side² vectors become patches.
      patch_size: pixels along each side of a patch.
      width, depth, heads: of the transformer.
      buffer_tokens: learned tokens before the vectors.
      causal: whether a patch is drawn from what stands before it and its own vector alone.
      dtype: of the matrix products; attention is float32.
    """

    side: int
    patch_size: int
    width: int
    depth: int
    heads: int
    buffer_tokens: int
    causal: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        x = Linear(self.width, self.dtype, kernel_init=vit.KERNEL_INIT, name="decoder_embed")(vectors)
        if self.buffer_tokens:
            buffer = vit.table(self, "class_embedding", self.buffer_tokens, self.width)
            x = jnp.concatenate([vit.repeat(buffer, x), x], axis=1)
        x = x + vit.table(self, "latent_token_positional_embedding", x.shape[1], self.width).astype(x.dtype)
        transformer = vit.Transformer(
            self.depth, self.heads, self.causal, self.dtype, attention_dtype=jnp.float32, name="transformer"
        )
        x = transformer(x)[:, None, -(self.side**2) :]  # [B, 1, side², W]
        x = vit.pointwise(3 * self.patch_size**2, "ffn_0", self.dtype)(x)
        x = vit.pixels_of_patches(x, self.side, self.patch_size)
        return jax.nn.sigmoid(vit.pointwise(3, "conv_out", self.dtype)(x).astype(jnp.float32))


class AliTok(vit.SequenceTokenizer):
    """The tokenizer; its interface is `base.CodebookTokenizer`. The decoder's images end at 0 and 1.

    Attributes:
      image_size: pixels along each side; a multiple of patch_size.
      patch_size: pixels along each side of a patch.
      prefix_tokens: codes before those of the patches.
      encoder_width, encoder_depth, encoder_heads: of the encoder.
      decoder_width, decoder_depth, decoder_heads: of the decoder.
      buffer_tokens: learned tokens that the decoder sees before the codes.
      causal_decoder: whether the decoder draws each patch from the codes up to its own, as in the first stage of
        training; the published decoder does not.
      codebook_size: number of codes.
      codebook_dim: width of latents and codes.
      l2_normalize: compare and decode vectors of length one; the published network does not.
      dtype: of the matrix products; parameters, norms, attention and distances are float32.
      precision: of products where dtype is float32, 'high' or 'highest', see `runtime.precision`.

    Raises RearError: the image size is no multiple of the patch size.
    """

    image_size: int
    patch_size: int = 16
    prefix_tokens: int = 17
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 1024
    decoder_depth: int = 24
    decoder_heads: int = 16
    buffer_tokens: int = 32
    causal_decoder: bool = False
    codebook_size: int = 4096
    codebook_dim: int = 32
    l2_normalize: bool = False
    dtype: Any = jnp.float32
    precision: str = "high"

    def setup(self) -> None:
        self.encoder = vit.Encoder(
            self.num_latent_tokens,
            self.patch_size,
            self.encoder_width,
            self.encoder_depth,
            self.encoder_heads,
            self.codebook_dim,
            class_token=False,
            legacy_reshape=False,
            dtype=self.dtype,
            attention_dtype=jnp.float32,
        )
        self.codebook = self.make_codebook()
        self.decoder = Decoder(
            self.side,
            self.patch_size,
            self.decoder_width,
            self.decoder_depth,
            self.decoder_heads,
            self.buffer_tokens,
            self.causal_decoder,
            self.dtype,
        )

    @property
    def num_latent_tokens(self) -> int:
        """N: the prefix, then a code per patch."""
        return self.prefix_tokens + self.side**2


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The attributes of `AliTok` that a file determines: all but image_size, heads, masks, l2_normalize and dtype."""
    patches, tokens = (len(tensors[k]) for k in ("encoder.positional_embedding", "latent_tokens"))
    found = vit.sizes(tensors)
    positions = len(tensors["decoder.latent_token_positional_embedding"])
    return found | {"prefix_tokens": tokens - patches, "buffer_tokens": positions - tokens}


FAMILY = TokenizerFamily(
    name="alitok",
    network=AliTok,
    layout=Layout(r"decoder\.transformer\.0\.attn\.in_proj\.weight", vit.torch_name, sizes),
    parameters=PARAMETERS,
    to_8_bit=truncate,
    extent=("encoder_width", "decoder_width", "prefix_tokens"),
    published={(768, 1024, 17): ("AliTok", 389.9)},
    of_decoder=("decoder_", "buffer_tokens", "causal_decoder"),
)
