"""The eyes of Janus-Pro: SigLIP's image tower (arXiv:2303.15343) and the aligner that leads into its language model.

The tower is ViT-L/16 at 384 pixels: patches with learned positions, no class token, blocks with biases, exact GELU and
LayerNorms of epsilon 1e-6. Its 576 features are those of the patches after the last norm; SigLIP's own attention pool
is not used (arXiv:2501.17811).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.generators.attention import product
from rear_jax.runtime.precision import Linear, gelu

NORM_EPSILON = 1e-6

layer_norm = functools.partial(nn.LayerNorm, epsilon=NORM_EPSILON, use_fast_variance=False)


class VisionBlock(nn.Module):
    """Self-attention and a feed-forward layer of four times the width, each after a norm and with a skip.

    Attributes:
      heads: of the attention.
      dtype: of the matrix products.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P W"]) -> Float[Array, "B P W"]:
        width = x.shape[-1]
        qkv = Linear(3 * width, self.dtype, name="qkv")(layer_norm(name="norm1")(x))
        x = x + Linear(width, self.dtype, name="proj")(attention(qkv, self.heads))
        hidden = gelu(Linear(4 * width, self.dtype, name="fc1")(layer_norm(name="norm2")(x)))
        return x + Linear(width, self.dtype, name="fc2")(hidden)


def attention(qkv: Float[Array, "B P 3W"], heads: int) -> Float[Array, "B P W"]:
    """Softmax attention, in float32, of queries, keys and values that lie side by side; every patch sees all."""
    batch, length, _ = qkv.shape
    queries, keys, values = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, -1), 2, 0)  # [B, P, heads, D] each
    scores = product("bthd,bshd->bhts", queries, keys, jnp.float32) * queries.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return product("bhts,bshd->bthd", weights, values, values.dtype).reshape(batch, length, -1)


class VisionTower(nn.Module):
    """Features of the patches of images that are normalised already, see `preprocess`.

    Attributes:
      width, depth, heads: of the transformer.
      image_size: S, pixels along each side of an image.
      patch_size: pixels along each side of a patch.
      dtype: of the matrix products.
    """

    width: int
    depth: int
    heads: int
    image_size: int
    patch_size: int
    dtype: Any

    @nn.compact
    def __call__(self, pixels: Float[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        """Features after the last norm, row by row of the P patches, float32.

        Raises RearError: the images have another size than the network's.
        """
        size, patch = self.image_size, self.patch_size
        if pixels.shape[1:] != (size, size, 3):
            raise RearError(f"this image tower wants images [B, {size}, {size}, 3], not {pixels.shape}")
        side = size // patch
        x = pixels.astype(jnp.float32).reshape(-1, side, patch, side, patch, 3)
        x = x.swapaxes(2, 3).reshape(-1, side**2, 3 * patch**2)  # [B, P, pixels of a patch]
        x = Linear(self.width, self.dtype, window=(patch, patch), name="patch_embed")(x)
        positions = self.param("pos_embed", nn.initializers.normal(self.width**-0.5), (1, side**2, self.width))
        block = VisionBlock(self.heads, self.dtype, name="blocks")
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = scan(block, x.astype(jnp.float32) + positions, None)
        return layer_norm(name="norm")(x)


class Aligner(nn.Module):
    """Two linear layers with the exact GELU between them: features of patches as the language model reads them.

    Attributes:
      features: W, width of the language model.
      dtype: of the matrix products.
    """

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P V"]) -> Float[Array, "B P W"]:
        x = gelu(Linear(self.features, self.dtype, name="layer0")(x))
        return Linear(self.features, self.dtype, name="layer2")(x)
