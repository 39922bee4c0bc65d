"""The published layout of the RAR family: AR, RAR and reAR state dicts."""

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from rear_jax.convert.layout import Path, TorchName, count_layers, leaf_name
from rear_jax.errors import RearError

log = logging.getLogger(__name__)

SIGNATURE = r"target_aware_pos_embed"
IGNORE: tuple[str, ...] = ()
TABLES = {"cls_token", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"}
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "adaln": "adaLN_modulation.1",
}
PROJECTOR = {"shallow_projector": "encode_align_mlp", "deep_projector": "decode_align_mlp"}


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `models.rar.RARTransformer` in the authors' files."""
    module, *inner = path
    if module in TABLES:
        return TorchName(module)
    if module == "embeddings":
        return TorchName("embeddings.weight")
    if module == "blocks":
        return leaf_name(f"blocks.{{i}}.{BLOCK[inner[0]]}", inner[-1])
    if module in PROJECTOR:  # an activation stands between two linear layers
        return leaf_name(f"{PROJECTOR[module]}.{2 * int(inner[0].removeprefix('layer'))}", inner[-1])
    return leaf_name({"head_adaln": "adaln_before_head.adaLN_modulation.1", "lm_head": "lm_head"}[module], inner[-1])


def projectors_in(keys: Iterable[str]) -> set[str]:
    """Which of reAR's two projectors a state dict has, by the names of their modules."""
    keys = list(keys)
    return {module for module, prefix in PROJECTOR.items() if any(key.startswith(f"{prefix}.") for key in keys)}


def keep_projectors(shapes: Mapping[str, Any], present: Collection[str], source: str) -> dict[str, Any]:
    """The modules of `shapes` without the projectors that are not `present` in a source.

    They serve in training alone, so a model without them can be trained further by reAR, which starts them afresh, and
    one with them can be used by a method that has none. The log tells.
    """
    absent = [module for module in PROJECTOR if module in shapes and module not in present]
    spare = [module for module in PROJECTOR if module in present and module not in shapes]
    if absent:
        log.info("%s has no %s, which serves in training alone", source, " and no ".join(absent))
    if spare:
        log.info("%s: leaving out %s, which this method does not use", source, " and ".join(spare))
    return {module: tree for module, tree in shapes.items() if module not in absent}


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, Any]:
    """The keys of `config.model` that a file determines.

    Raises:
      RearError: the file lacks what they are read from.
    """
    try:
        width = tensors["embeddings.weight"].shape[1]
        return {
            "width": width,
            "depth": count_layers(tensors, r"blocks\.(\d+)\."),
            "heads": width // tensors["blocks.0.attn.q_norm.weight"].shape[0],
            "mlp_width": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        }
    except KeyError as error:
        raise RearError(f"{source} has no tensor {error}: it is not a whole RAR or reAR checkpoint.") from error
