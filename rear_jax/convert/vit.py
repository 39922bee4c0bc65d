"""What the published files of tokenizers made of vision transformers have in common."""

from collections.abc import Mapping

import numpy as np

from rear_jax.convert.layout import CONV, LINEAR, Path, TorchName, count_layers

TABLES = {"class_embedding", "positional_embedding", "latent_token_positional_embedding", "mask_token"}
LINEARS = {"decoder_embed", "in_proj", "out_proj", "c_fc", "c_proj"}  # the other kernels are of convolutions
PARTS = {"in_proj": "attn", "out_proj": "attn", "c_fc": "mlp", "c_proj": "mlp"}  # of a block


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
        prefix = f"{root}.transformer.{{i}}." + (f"{PARTS[module]}.{module}" if module in PARTS else module)
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
