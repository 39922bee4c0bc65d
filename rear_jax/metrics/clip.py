"""CLIP: images and texts as vectors of one space, in which a cosine says how well they fit (arXiv:2103.00020).

The networks are the vision transformers of OpenAI (ViT-B/32, ViT-L/14) and the ViT-H-14 of open_clip, which is also the
network of HPSv2 (arXiv:2306.09341). They differ in their sizes and in one activation: OpenAI trained with
x·sigmoid(1.702x), open_clip with the exact GELU. The weights are the user's: see `clip_files`.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rear_jax.errors import RearError
from rear_jax.losses import negative_cosine
from rear_jax.runtime.precision import Linear, gelu, of_products, products_at

NORM_EPSILON = 1e-5


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x·sigmoid(1.702x), OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
layer_norm = functools.partial(nn.LayerNorm, epsilon=NORM_EPSILON, use_fast_variance=False)


class Tower(NamedTuple):
    """Sizes of one of the two transformers; its feed-forward layers are four times as wide."""

    width: int
    depth: int
    heads: int


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each after a norm and with a skip.

    Attributes:
      heads: of the attention.
      causal: whether a position attends to itself and earlier ones only.
      activation: a key of ACTIVATIONS.
    """

    heads: int
    causal: bool
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        width = x.shape[-1]
        qkv = Linear(3 * width, name="in_proj")(layer_norm(name="ln_1")(x))
        x = x + Linear(width, name="out_proj")(attention(qkv, self.heads, self.causal))
        hidden = Linear(4 * width, name="c_fc")(layer_norm(name="ln_2")(x))
        return x + Linear(width, name="c_proj")(ACTIVATIONS[self.activation](hidden))


def attention(qkv: Float[Array, "B T 3W"], heads: int, causal: bool) -> Float[Array, "B T W"]:
    """Softmax attention of queries, keys and values that lie side by side."""
    batch, length, _ = qkv.shape
    queries, keys, values = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, -1), 2, 0)  # [B, T, heads, D] each
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys, precision=of_products()) * queries.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, values, precision=of_products()).reshape(batch, length, -1)


def transform(x: Float[Array, "B T W"], tower: Tower, *, causal: bool, activation: str) -> Float[Array, "B T W"]:
    """The blocks of a tower one after the other, as a part of the module that calls this.

    Their parameters are stacked as [L, ...] under `blocks`.
    """
    block = Block(tower.heads, causal, activation, name="blocks")
    scan = nn.scan(
        nn.remat(lambda block, x, _: (block(x), None), prevent_cse=False),  # the backward pass reads x alone
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=tower.depth,
    )
    return scan(block, x, None)[0]


class CLIPImage(nn.Module):
    """Features of images that are normalised already, see `clip_preprocess`.

    Attributes:
      embedding_dim: E, of the features.
      image_size: S, pixels along each side of an image.
      patch_size: pixels along each side of a patch.
      tower: sizes of the transformer.
      activation: a key of ACTIVATIONS.
    """

    embedding_dim: int
    image_size: int
    patch_size: int
    tower: Tower
    activation: str

    @nn.compact
    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """Features before any normalisation, float32.

        Raises RearError: the images have another size than the network's.
        """
        if pixels.shape[1:] != (self.image_size, self.image_size, 3):
            raise RearError(f"this CLIP wants images [B, {self.image_size}, {self.image_size}, 3], not {pixels.shape}")
        side, patch, width = self.image_size // self.patch_size, self.patch_size, self.tower.width
        x = pixels.astype(jnp.float32).reshape(-1, side, patch, side, patch, 3)
        x = x.swapaxes(2, 3).reshape(-1, side**2, 3 * patch**2)  # [B, patches, pixels of a patch]
        x = Linear(width, use_bias=False, window=(patch, patch), name="patch_embed")(x)
        start = self.param("class_embedding", nn.initializers.normal(width**-0.5), (width,))
        x = jnp.concatenate([jnp.broadcast_to(start, (len(x), 1, width)), x], axis=1)
        x = x + self.param("positional_embedding", nn.initializers.normal(width**-0.5), (side**2 + 1, width))
        x = transform(layer_norm(name="ln_pre")(x), self.tower, causal=False, activation=self.activation)
        return Linear(self.embedding_dim, use_bias=False, name="proj")(layer_norm(name="ln_post")(x[:, 0]))


class CLIPText(nn.Module):
    """Features of texts as ids, see `rear_jax/text/clip_vocabulary.py`.

    Attributes:
      embedding_dim: E, of the features.
      vocab_size: number of ids; the last one is the end of a text.
      context_length: T, positions of a text.
      tower: sizes of the transformer.
      activation: a key of ACTIVATIONS.
    """

    embedding_dim: int
    vocab_size: int
    context_length: int
    tower: Tower
    activation: str

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """Features before any normalisation, float32; they are read where the highest id stands first.

        Raises RearError: the texts have another length than the network's.
        """
        if ids.shape[1:] != (self.context_length,):
            raise RearError(f"this CLIP wants texts as ids [B, {self.context_length}], not {ids.shape}")
        width = self.tower.width
        table = self.param("token_embedding", nn.initializers.normal(0.02), (self.vocab_size, width))
        x = table[ids] + self.param("positional_embedding", nn.initializers.normal(0.01), (self.context_length, width))
        x = transform(x, self.tower, causal=True, activation=self.activation)
        x = x[jnp.arange(len(x)), jnp.argmax(ids, axis=1)]  # [B, W], at the end of each text
        return Linear(self.embedding_dim, use_bias=False, name="proj")(layer_norm(name="ln_final")(x))


class CLIP(nn.Module):
    """Both networks; the parameters of one are all that its features need.

    Attributes:
      embedding_dim: E, of the features.
      image_size: S, pixels along each side of an image.
      patch_size: pixels along each side of a patch.
      vision, words: sizes of the transformers of images and of texts.
      vocab_size: number of ids; the last one is the end of a text.
      context_length: T, positions of a text.
      activation: a key of ACTIVATIONS.
      precision: of the float32 products, see `runtime.precision`. Scores take 'highest', rewards 'high'.
    """

    embedding_dim: int
    image_size: int
    patch_size: int
    vision: Tower
    words: Tower
    vocab_size: int
    context_length: int
    activation: str
    precision: str = "highest"

    def setup(self) -> None:
        dim, activation = self.embedding_dim, self.activation
        self.image = CLIPImage(dim, self.image_size, self.patch_size, self.vision, activation)
        self.text = CLIPText(dim, self.vocab_size, self.context_length, self.words, activation)

    def image_features(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """As of `CLIPImage`, and its errors."""
        with products_at(self.precision):
            return self.image(pixels)

    def text_features(self, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
        """As of `CLIPText`, and its errors."""
        with products_at(self.precision):
            return self.text(ids)

    def __call__(self, pixels: Float[Array, "B S S 3"], ids: Int[Array, "C T"]) -> Float[Array, "B C"]:
        """The cosine of each image with each text."""
        return -negative_cosine(self.image_features(pixels)[:, None], self.text_features(ids)[None])
