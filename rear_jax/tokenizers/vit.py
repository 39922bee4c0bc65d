"""Vision transformers that tokenizers with a sequence of codes share (TiTok, arXiv 2406.07550; AliTok, 2506.05289).

The blocks are those of CLIP's image tower as in open_clip: LayerNorm with eps 1e-5 before each part, queries, keys and
values from one biased linear layer, exact GELU. Every table of positions or tokens is learned.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.runtime.precision import Linear, gelu
from rear_jax.tokenizers.base import CodebookTokenizer
from rear_jax.weights.layout import CONV, LINEAR, Path, TorchName, count_layers

# The authors' `trunc_normal_(std=0.02)` cuts at ±2, a hundred standard deviations: no draw is ever cut.
KERNEL_INIT = nn.initializers.normal(0.02)
FUSED_INIT = nn.initializers.xavier_uniform()  # of PyTorch's `MultiheadAttention`, which TiTok leaves as it is

# of the published files
TABLES = {"class_embedding", "positional_embedding", "latent_token_positional_embedding", "mask_token"}
LINEARS = {"decoder_embed", "in_proj", "out_proj", "c_fc", "c_proj"}  # the other kernels are of convolutions
OF_BLOCK = {"in_proj": "attn", "out_proj": "attn", "c_fc": "mlp", "c_proj": "mlp"}  # of a block


class Block(nn.Module):
    """Self-attention and a feed-forward layer four times as wide, each after a norm and with a skip.

    Attributes:
      heads: of the attention.
      causal: whether a position attends to itself and earlier ones only.
      dtype: of the matrix products.
      attention_dtype: of queries, keys and values; their softmax is float32 in any case.
      qkv_init: how their kernel starts.
    """

    heads: int
    causal: bool
    dtype: Any
    attention_dtype: Any
    qkv_init: Any = KERNEL_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        b, t, w = x.shape
        dense = functools.partial(Linear, dtype=self.dtype, kernel_init=KERNEL_INIT)
        qkv = Linear(3 * w, self.dtype, kernel_init=self.qkv_init, name="in_proj")(layer_norm("ln_1", self.dtype)(x))
        qkv = qkv.astype(self.attention_dtype)
        q, k, v = (part.reshape(b, t, self.heads, -1) for part in jnp.split(qkv, 3, axis=-1))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(b, t, w)
        x = x + dense(w, name="out_proj")(attended)
        hidden = gelu(dense(4 * w, name="c_fc")(layer_norm("ln_2", self.dtype)(x)))
        return x + dense(w, name="c_proj")(hidden)


class Transformer(nn.Module):
    """Blocks one after the other between two norms, their parameters stacked as [L, ...] under `blocks`.

    Attributes:
      depth: L.
      heads, causal, dtype, attention_dtype, qkv_init: of each `Block`.
    """

    depth: int
    heads: int
    causal: bool = False
    dtype: Any = jnp.float32
    attention_dtype: Any = jnp.float32
    qkv_init: Any = KERNEL_INIT

    @nn.compact
    def __call__(self, x: Float[Array, "B T W"]) -> Float[Array, "B T W"]:
        block = Block(self.heads, self.causal, self.dtype, self.attention_dtype, self.qkv_init, name="blocks")
        scan = nn.scan(
            nn.remat(lambda block, x, _: (block(x), None), prevent_cse=False),  # the backward pass reads x alone
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = scan(block, layer_norm("ln_pre", self.dtype)(x), None)
        return layer_norm("ln_post", self.dtype)(x)


class Encoder(nn.Module):
    """Patches of images in [0, 1] and learned latent tokens attend to each other; the latter become the latents.

    Attributes:
      num_latent_tokens: N.
      patch_size: pixels along each side of a patch.
      width, depth, heads: of the transformer.
      codebook_dim: D.
      class_token: whether a learned token stands before the patches.
      legacy_reshape: read the memory of the latents [N, W] as [W, N] before the last layer, as TiTok's released
        weights were trained: each latent then mixes parts of several tokens.
      dtype, attention_dtype, qkv_init: see `Block`.
    """

    num_latent_tokens: int
    patch_size: int
    width: int
    depth: int
    heads: int
    codebook_dim: int
    class_token: bool
    legacy_reshape: bool
    dtype: Any = jnp.float32
    attention_dtype: Any = jnp.float32
    qkv_init: Any = KERNEL_INIT

    @nn.compact
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
        batch, patch, width = images.shape[0], (self.patch_size,) * 2, self.width
        embed = Linear(width, self.dtype, kernel_init=KERNEL_INIT, window=patch, name="patch_embed")
        x = embed(patches_of_pixels(images, self.patch_size))
        if self.class_token:
            x = jnp.concatenate([repeat(table(self, "class_embedding", 1, width), x), x], axis=1)
        x = x + table(self, "positional_embedding", x.shape[1], width).astype(x.dtype)
        tokens = table(self, "latent_tokens", self.num_latent_tokens, width)
        tokens = tokens + table(self, "latent_token_positional_embedding", self.num_latent_tokens, width)
        x = jnp.concatenate([x, repeat(tokens, x)], axis=1)
        transformer = Transformer(
            self.depth,
            self.heads,
            dtype=self.dtype,
            attention_dtype=self.attention_dtype,
            qkv_init=self.qkv_init,
            name="transformer",
        )
        x = transformer(x)[:, -self.num_latent_tokens :]  # [B, N, W]
        if self.legacy_reshape:
            x = x.reshape(batch, width, self.num_latent_tokens).swapaxes(1, 2)
        return pointwise(self.codebook_dim, "conv_out", self.dtype)(x).astype(jnp.float32)


class SequenceTokenizer(CodebookTokenizer):
    """A `CodebookTokenizer` whose codes form a sequence.

    It has the attributes `patch_size` beside `image_size`, and width and heads of two transformers, `encoder_width`,
    `encoder_heads`, `decoder_width` and `decoder_heads`.

    Raises RearError: the image size is no multiple of the patch size, or a width none of the heads.
    """

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise RearError(
                f"data.image_size {self.image_size} is not a multiple of tokenizer.patch_size {self.patch_size}: "
                "change either"
            )
        for part in ("encoder", "decoder"):
            width, heads = (f"{part}_width", f"{part}_heads")
            values = getattr(self, width), getattr(self, heads)
            if values[0] % values[1]:
                told = [
                    f"config.tokenizer.{name} = {value}" for name, value in zip((width, heads), values, strict=True)
                ]
                raise RearError(f"{told[0]} is not divisible by {told[1]}.")
        super().__post_init__()

    @property
    def side(self) -> int:
        """Patches along each side of an image."""
        return self.image_size // self.patch_size

    @property
    def latent_shape(self) -> tuple[int]:
        """(N,)."""
        return (self.num_latent_tokens,)


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    """LayerNorm with eps 1e-5; statistics are float32."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=dtype, name=name)


def pointwise(features: int, name: str, dtype: Any) -> Linear:
    """A 1×1 convolution: a linear layer whose published weights have two axes more."""
    return Linear(features, dtype, kernel_init=KERNEL_INIT, window=(1, 1), name=name)


def table(module: nn.Module, name: str, rows: int, width: int) -> Float[Array, "rows width"]:
    """A learned table of `module`, first drawn with standard deviation width^-½."""
    return module.param(name, nn.initializers.normal(width**-0.5), (rows, width))


def repeat(rows: Float[Array, "T W"], like: Float[Array, "B S W"]) -> Float[Array, "B T W"]:
    """The same rows for each example of `like`, in its dtype."""
    return jnp.broadcast_to(rows.astype(like.dtype), (like.shape[0], *rows.shape))


def patches_of_pixels(images: Float[Array, "B H W 3"], patch_size: int) -> Float[Array, "B n C"]:
    """The patches of images, row by row; each holds its pixels row by row, colours last: C = 3·patch_size²."""
    batch, height, width, colours = images.shape
    x = images.reshape(batch, height // patch_size, patch_size, width // patch_size, patch_size, colours)
    return x.swapaxes(2, 3).reshape(batch, -1, patch_size**2 * colours)


def pixels_of_patches(x: Float[Array, "B n C"], side: int, patch_size: int) -> Float[Array, "B H W 3"]:
    """Images whose patches, row by row, hold their pixels row by row, colours last: C = 3·patch_size²."""
    x = x.reshape(-1, side, side, patch_size, patch_size, 3)
    return x.swapaxes(2, 3).reshape(-1, side * patch_size, side * patch_size, 3)


def torch_name(path: Path) -> TorchName:
    """Where a parameter of encoder, decoder or codebook lies in the file."""
    if path == ("encoder", "latent_tokens"):
        return TorchName("latent_tokens")
    if path == ("codebook",):
        return TorchName("quantize.embedding.weight")
    root, *modules, leaf = path
    if leaf in TABLES:
        return TorchName(f"{root}.{leaf}")
    if "blocks" in modules:
        module = modules[-1]
        prefix = f"{root}.transformer.{{i}}." + (f"{OF_BLOCK[module]}.{module}" if module in OF_BLOCK else module)
    else:
        prefix = f"{root}.{modules[-1].replace('ffn_', 'ffn.')}"
    axes = None if leaf != "kernel" else LINEAR if modules[-1] in LINEARS else CONV
    return TorchName(f"{prefix}.{'bias' if leaf == 'bias' else 'weight'}", axes)


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Widths, depths and codebook, as the config calls them; the number of heads does not show in a file.

    Raises:
      KeyError: a tensor is not there.
    """
    found = {"patch_size": tensors["encoder.patch_embed.weight"].shape[-1]}
    for part, layer in (("encoder", "patch_embed"), ("decoder", "decoder_embed")):
        found[f"{part}_width"] = tensors[f"{part}.{layer}.weight"].shape[0]
        found[f"{part}_depth"] = count_layers(tensors, rf"{part}\.transformer\.(\d+)\.")
    found["codebook_size"], found["codebook_dim"] = tensors["quantize.embedding.weight"].shape
    return found
