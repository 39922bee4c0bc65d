"""The published AliTok generators (`alitok_b.bin`; arXiv 2506.05289), and this project's additions to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert import rar
from rear_jax.convert.layout import Path, TorchName, count_layers, leaf_name
from rear_jax.errors import RearError

SIGNATURE = r"blocks\.0\.mlp\.w3\.weight"
IGNORE = ("freqs_cis",)  # a table that the authors' code keeps beside the parameters
TABLES = {
    "embeddings": "embeddings.weight",
    "target_aware_pos_embed": "target_positions.weight",  # in no published file
}
MODULES = {"norm": "norm", "lm_head": "output"}
BLOCK = {
    "attention_norm": "norm1",
    "qkv": "attn.qkv",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "proj": "attn.proj",
    "mlp_norm": "norm2",
    "gate": "mlp.w1",
    "up": "mlp.w3",
    "down": "mlp.w2",
}


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `models.alitok.AliTokTransformer` in the authors' files.

    reAR's projectors, which these files do not have, are called as in its own.
    """
    module, *inner = path
    if module in TABLES:
        return TorchName(TABLES[module])
    if module in rar.PROJECTOR:
        return rar.torch_name(path)
    prefix = f"blocks.{{i}}.{BLOCK[inner[0]]}" if module == "blocks" else MODULES[module]
    return leaf_name(prefix, inner[-1])


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The keys of `config.model` that a file determines: its sizes, without `prefix_tokens`.

    Raises:
      RearError: the file lacks what they are read from.
    """
    try:
        width = tensors["embeddings.weight"].shape[1]
        return {
            "width": width,
            "depth": count_layers(tensors, r"blocks\.(\d+)\."),
            "heads": width // tensors["blocks.0.attn.q_norm.weight"].shape[0],
            "mlp_width": tensors["blocks.0.mlp.w1.weight"].shape[0],
            "target_positions": TABLES["target_aware_pos_embed"] in tensors,
        }
    except KeyError as error:
        raise RearError(f"{source} has no tensor {error}: it is not a whole AliTok generator.") from error
