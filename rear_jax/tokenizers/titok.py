"""TiTok: an image as a short sequence of codes without a grid (arXiv 2406.07550).

The published TiTok-S-128, -B-64 and -L-32 (4096 unit-length codes of width 12) do not decode to pixels: their decoder
predicts, for each cell of MaskGIT-VQGAN's 16×16 grid, which of its 1024 codes stands there, and the vectors of these
codes, mixed by the predicted probabilities, go through MaskGIT-VQGAN's decoder. The later `vq8k` networks make pixels
themselves. Parameters, MaskGIT's 30.7M included: 83.7M, 204.8M, 641.1M. Images are in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime.precision import Linear, products_at
from rear_jax.tokenizers import blocks, grid, maskgit_vqgan, quantizer, vit
from rear_jax.tokenizers.family import PARAMETERS, TokenizerFamily
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Hub, Layout, Path, TorchName


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
        x = Linear(width, self.dtype, kernel_init=vit.KERNEL_INIT, name="decoder_embed")(vectors)
        x = x + vit.table(self, "latent_token_positional_embedding", x.shape[1], width).astype(x.dtype)
        mask_token = self.param("mask_token", nn.initializers.normal(width**-0.5), (1, 1, width))
        mask_tokens = jnp.broadcast_to(mask_token[0], (patches, width))
        asking = jnp.concatenate([vit.table(self, "class_embedding", 1, width), mask_tokens])
        asking = asking + vit.table(self, "positional_embedding", patches + 1, width)
        x = jnp.concatenate([vit.repeat(asking, x), x], axis=1)
        transformer = vit.Transformer(
            self.depth,
            self.heads,
            dtype=self.dtype,
            attention_dtype=self.dtype,
            qkv_init=vit.FUSED_INIT,
            name="transformer",
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
        return nn.Conv(3, (3, 3), dtype=jnp.float32, kernel_init=vit.KERNEL_INIT, name="conv_out")(x)


class TiTok(vit.SequenceTokenizer):
    """The tokenizer; its interface is `base.CodebookTokenizer`.

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
      precision: of products where dtype is float32, 'high' or 'highest', see `runtime.precision`.

    Raises RearError: the image size is no multiple of the patch size, or `predicts` is neither.
    """

    image_size: int
    patch_size: int = 16
    num_latent_tokens: int = 64
    encoder_width: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    codebook_size: int = 4096
    codebook_dim: int = 12
    l2_normalize: bool = True
    legacy_reshape: bool = True
    predicts: Literal["codes", "pixels"] = "codes"
    proxy_codebook_size: int = 1024
    proxy_dim: int = 256
    proxy_channels: int = 128
    proxy_channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    proxy_res_blocks: int = 2
    dtype: Any = jnp.float32
    precision: str = "high"

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
            qkv_init=vit.FUSED_INIT,
        )
        self.codebook = self.make_codebook()
        trunk = PatchDecoder(
            self.side, self.decoder_width, self.decoder_depth, self.decoder_heads, self.dtype, parent=None
        )
        if self.predicts == "pixels":
            self.decoder = PixelDecoder(trunk, self.patch_size, self.dtype)
            return
        self.decoder = CodePredictor(trunk, self.proxy_codebook_size, self.dtype)
        sizes = self.proxy_codebook_size, self.proxy_dim
        self.pixel_codebook = self.param("pixel_codebook", quantizer.codebook_init, sizes)
        sizes = (self.proxy_channels, self.proxy_channel_mult, self.proxy_res_blocks)
        self.pixel_decoder = blocks.Decoder(*sizes, maskgit_vqgan.MaskGitVQGAN.coarse_first, self.dtype)

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
        with products_at(self.precision):
            return self.decoder(vectors)

    def decode_embeddings(self, vectors: Float[Array, "B N D"]) -> Float[Array, "B H W 3"]:
        """Images of codebook vectors or mixtures of them, unclamped."""
        predicted = self.pixel_logits(vectors)
        if self.predicts == "pixels":
            return predicted
        with products_at(self.precision):
            return self.pixel_decoder(jax.nn.softmax(predicted) @ self.pixel_codebook)


class Size(NamedTuple):
    """Of a transformer."""

    width: int
    depth: int
    heads: int


MODEL_SIZES = {"small": Size(512, 8, 8), "base": Size(768, 12, 12), "large": Size(1024, 24, 16)}  # as hubs call them


def proxy_section(settings: Mapping[str, Any]) -> ConfigDict | None:
    """The config section of the MaskGIT-VQGAN whose codes a TiTok predicts; None where it predicts none."""
    if settings["predicts"] != "codes":
        return None
    proxy = maskgit_vqgan.FAMILY.section()
    proxy.codebook_size = settings["proxy_codebook_size"]
    proxy.z_channels = settings["proxy_dim"]
    proxy.hidden_channels = settings["proxy_channels"]
    proxy.channel_mult = settings["proxy_channel_mult"]
    proxy.num_res_blocks = settings["proxy_res_blocks"]
    proxy.dtype = settings["dtype"]
    return proxy


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `TiTok` lies in the file."""
    if path == ("pixel_codebook",):
        return TorchName("pixel_quantize.embedding.weight")
    if path[0] == "pixel_decoder":
        return grid.torch_name(path)
    name = vit.torch_name(path)
    return name._replace(key=name.key.replace("attn.in_proj.", "attn.in_proj_"))  # parameters of no module there


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The attributes of `TiTok` that a file determines: all but image_size, l2_normalize and dtype.

    The authors' code has one flag, `is_legacy`, for what the decoder predicts and how the encoder reads its latents, so
    the one tells the other. The number of heads does not show where a width is none of `MODEL_SIZES`.
    """
    found = vit.sizes(tensors) | {"num_latent_tokens": len(tensors["latent_tokens"])}
    heads = {size.width: size.heads for size in MODEL_SIZES.values()}
    for part in ("encoder", "decoder"):
        if found[f"{part}_width"] in heads:
            found[f"{part}_heads"] = heads[found[f"{part}_width"]]
    if "decoder.ffn.2.weight" not in tensors:
        return found | {"predicts": "pixels", "legacy_reshape": False}
    return found | {"predicts": "codes", "legacy_reshape": True} | _proxy_sizes(tensors)


def hub_sizes(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The attributes of `TiTok` that a hub folder's `config.json` gives beyond what the weights determine.

    Raises RearError: it is not the one of a TiTok with a codebook.
    """
    try:
        settings = config["model"]["vq_model"]
        if settings.get("quantize_mode", "vq") != "vq":
            raise RearError(f"{source} describes a TiTok without a codebook, which cannot be used here.")
        return {
            "encoder_heads": MODEL_SIZES[settings["vit_enc_model_size"]].heads,
            "decoder_heads": MODEL_SIZES[settings["vit_dec_model_size"]].heads,
            "l2_normalize": settings["use_l2_norm"],
            "legacy_reshape": settings.get("is_legacy", True),
        }
    except (KeyError, TypeError) as missing:
        raise RearError(f"{source} lacks {missing}: it is not TiTok's. Give the file with the weights.") from missing


def require_published_form(settings: Mapping[str, Any]) -> None:
    """Raises RearError unless the authors' code could have a TiTok with these settings, see `sizes`."""
    reshape, predicts = settings["legacy_reshape"], settings["predicts"]
    if reshape != (predicts == "codes"):
        raise RearError(
            f"config.tokenizer.legacy_reshape = {reshape} with predicts = {predicts!r} has no published form, in which "
            "one flag tells both: such a TiTok cannot be exported."
        )


def hub_config(settings: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """The `config.json` of a hub folder with a TiTok of these settings, by which the authors' code builds it.

    Raises RearError: a transformer has none of the sizes that it can name.
    """
    vq_model = {
        "codebook_size": settings["codebook_size"],
        "token_size": settings["codebook_dim"],
        "use_l2_norm": settings["l2_normalize"],
        "commitment_cost": 0.25,  # of training alone
        "vit_enc_model_size": _size_name(settings, "encoder"),
        "vit_dec_model_size": _size_name(settings, "decoder"),
        "vit_enc_patch_size": settings["patch_size"],
        "vit_dec_patch_size": settings["patch_size"],
        "num_latent_tokens": settings["num_latent_tokens"],
        "finetune_decoder": settings["predicts"] == "codes",
        "is_legacy": settings["legacy_reshape"],
    }
    return {"model": {"vq_model": vq_model}, "dataset": {"preprocessing": {"crop_size": image_size}}}


def _size_name(settings: Mapping[str, Any], part: str) -> str:
    """What hubs call the size of the encoder or decoder."""
    size = Size(*(settings[f"{part}_{field}"] for field in Size._fields))
    names = [name for name, known in MODEL_SIZES.items() if known == size]
    if not names:
        raise RearError(
            f"config.tokenizer.{part}_width, _depth and _heads = {tuple(size)} are none of TiTok's "
            f"{', '.join(MODEL_SIZES)}, which alone a hub's folder can name: export to a .safetensors or .bin file."
        )
    return names[0]


def _proxy_sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of MaskGIT-VQGAN's decoder and codebook."""
    codebook_size, width = tensors["pixel_quantize.embedding.weight"].shape
    channels = tensors["pixel_decoder.norm_out.weight"].shape[0]
    levels = grid.numbered(tensors, "pixel_decoder.up.{}.block.0.conv1.weight")
    return {
        "proxy_codebook_size": codebook_size,
        "proxy_dim": width,
        "proxy_channels": channels,
        "proxy_channel_mult": tuple(kernel.shape[0] // channels for kernel in levels),
        "proxy_res_blocks": len(grid.numbered(tensors, "pixel_decoder.mid.{}.conv1.weight")),
    }


FAMILY = TokenizerFamily(
    name="titok",
    network=TiTok,
    layout=Layout(
        signature=r"decoder\.mask_token",
        torch_name=torch_name,
        sizes=sizes,
        ignore=("pixel_quantize.", "pixel_decoder."),  # spare in a file of a network that makes pixels itself
        hub=Hub(hub_sizes, hub_config, require_published_form),
    ),
    parameters=PARAMETERS,
    to_8_bit=truncate,
    extent=("decoder_width", "predicts", "num_latent_tokens"),
    published={
        (512, "codes", 128): ("TiTok-S-128", 83.7),
        (768, "codes", 64): ("TiTok-B-64", 204.8),
        (1024, "codes", 32): ("TiTok-L-32", 641.1),
        (1024, "pixels", 64): ("TiTok-BL-64 VQ", 390.0),
    },
    of_decoder=("decoder_", "predicts", "proxy_"),
    proxy=proxy_section,
)
