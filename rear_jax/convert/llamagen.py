"""The published LlamaGen generators: class-conditional `c2i_*.pt` and text-conditional `t2i_*.pt` state dicts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.convert.layout import LINEAR, Path, TorchName, count_layers
from rear_jax.errors import RearError

SIGNATURE = r"cls_embedding\.(embedding_table\.weight|uncond_embedding)"
IGNORE = ("freqs_cis", "causal_mask")  # tables that the authors' code keeps beside the parameters
WIDE_HEADS = {3200: 32}  # GPT-3B; everywhere else a head has 64 features
TABLES = {
    "code_embeddings": "tok_embeddings.weight",
    "class_embeddings": "cls_embedding.embedding_table.weight",
    "null_caption": "cls_embedding.uncond_embedding",
}
MODULES = {
    "caption_fc1": "cls_embedding.cap_proj.fc1",
    "caption_fc2": "cls_embedding.cap_proj.fc2",
    "norm": "norm",
    "lm_head": "output",
}
BLOCK = {
    "attention_norm": "attention_norm",
    "qkv": "attention.wqkv",
    "proj": "attention.wo",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `models.llamagen.LlamaGenTransformer` in the authors' files."""
    if path[0] in TABLES:
        return TorchName(TABLES[path[0]])
    *modules, leaf = path
    prefix = f"layers.{{i}}.{BLOCK[modules[1]]}" if modules[0] == "blocks" else MODULES[modules[0]]
    return TorchName(f"{prefix}.weight", LINEAR if leaf == "kernel" else None)


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The keys of a config's `model` section that a file determines.

    Without `heads` where the width is none of a published model, and without the caption's sizes in a class-conditional
    file.

    Raises:
      RearError: the file is not a LlamaGen generator's.
    """
    try:
        width = tensors["tok_embeddings.weight"].shape[1]
        mlp_width = tensors["layers.0.feed_forward.w1.weight"].shape[0]
        found = {"width": width, "depth": count_layers(tensors, r"layers\.(\d+)\."), "mlp_width": mlp_width}
        if "cls_embedding.embedding_table.weight" in tensors:
            found["condition"] = "class"
        else:
            length, dim = tensors["cls_embedding.uncond_embedding"].shape
            found |= {"condition": "text", "caption_length": length, "caption_dim": dim}
    except KeyError as error:
        raise RearError(f"{source} has no tensor {error}: it is not a LlamaGen checkpoint") from error
    if width in WIDE_HEADS or width % 64 == 0:
        found["heads"] = WIDE_HEADS.get(width, width // 64)
    return found
