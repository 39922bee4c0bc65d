"""TiTok's published files: flat PyTorch state dicts (`tokenizer_titok_l32.bin`, hub folders; arXiv 2406.07550)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rear_jax.convert import vit, vqgan
from rear_jax.convert.layout import Path, TorchName
from rear_jax.errors import RearError

SIGNATURE = r"decoder\.mask_token"
IGNORE = ("pixel_quantize.", "pixel_decoder.")  # spare in a file of a network that makes pixels itself


class Size(NamedTuple):
    """Of a transformer."""

    width: int
    depth: int
    heads: int


MODEL_SIZES = {"small": Size(512, 8, 8), "base": Size(768, 12, 12), "large": Size(1024, 24, 16)}  # as hubs call them


def torch_name(path: Path) -> TorchName:
    """Where the parameter at `path` of `TiTok` lies in the file."""
    if path == ("pixel_codebook",):
        return TorchName("pixel_quantize.embedding.weight")
    if path[0] == "pixel_decoder":
        return vqgan.torch_name(path)
    name = vit.torch_name(path)
    return name._replace(key=name.key.replace("attn.in_proj.", "attn.in_proj_"))  # parameters of no module there


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The attributes of `TiTok` that a file determines: all but image_size, l2_normalize and dtype.

    The authors' code has one flag, `is_legacy`, for what the decoder predicts and how the encoder reads its latents, so
    the one tells the other. The number of heads does not show where a width is none of `MODEL_SIZES`.

    Raises:
      RearError: the file is not a state dict of this tokenizer.
    """
    try:
        found = vit.sizes(tensors) | {"num_latent_tokens": len(tensors["latent_tokens"])}
        heads = {size.width: size.heads for size in MODEL_SIZES.values()}
        for part in ("encoder", "decoder"):
            if found[f"{part}_width"] in heads:
                found[f"{part}_heads"] = heads[found[f"{part}_width"]]
        if "decoder.ffn.2.weight" not in tensors:
            return found | {"predicts": "pixels", "legacy_reshape": False}
        return found | {"predicts": "codes", "legacy_reshape": True} | _proxy_sizes(tensors)
    except KeyError as missing:
        raise vqgan.foreign_file(source, missing, "TiTok") from missing


def hub_sizes(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The attributes of `TiTok` that a hub folder's `config.json` gives beyond what the weights determine.

    Raises:
      RearError: it is not the one of a TiTok with a codebook.
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

    Raises:
      RearError: a transformer has none of the sizes that it can name.
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
    levels = vqgan.numbered(tensors, "pixel_decoder.up.{}.block.0.conv1.weight")
    return {
        "proxy_codebook_size": codebook_size,
        "proxy_dim": width,
        "proxy_channels": channels,
        "proxy_channel_mult": tuple(kernel.shape[0] // channels for kernel in levels),
        "proxy_res_blocks": len(vqgan.numbered(tensors, "pixel_decoder.mid.{}.conv1.weight")),
    }
