"""The RAR family: the generators of AR, RAR and reAR."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rear_jax.generators import layers
from rear_jax.generators.family import ORDERS, TAPS, GeneratorFamily
from rear_jax.generators.layers import PROJECTOR_KEYS, projector_name
from rear_jax.generators.rar.cached import CachedRAR
from rear_jax.generators.rar.network import RARTransformer
from rear_jax.runtime.sharding import ROWS, Rule, split_columns, split_rows
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout, Path, TorchName, count_layers, leaf_name

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


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `RARTransformer` in the authors' files."""
    module, *inner = path
    if module in TABLES:
        return TorchName(module)
    if module == "embeddings":
        return TorchName("embeddings.weight")
    if module == "blocks":
        return leaf_name(f"blocks.{{i}}.{BLOCK[inner[0]]}", inner[-1])
    if module in PROJECTOR_KEYS:
        return projector_name(path)
    return leaf_name({"head_adaln": "adaln_before_head.adaLN_modulation.1", "lm_head": "lm_head"}[module], inner[-1])


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of `config.model` that a file determines."""
    width = tensors["embeddings.weight"].shape[1]
    return {
        "width": width,
        "depth": count_layers(tensors, r"blocks\.(\d+)\."),
        "heads": width // tensors["blocks.0.attn.q_norm.weight"].shape[0],
        "mlp_width": tensors["blocks.0.mlp.fc1.weight"].shape[0],
    }


FAMILY = GeneratorFamily(
    name="rar",
    network=RARTransformer,
    class_table="embeddings",
    multiplies=True,
    layout=Layout(signature=r"target_aware_pos_embed", torch_name=torch_name, sizes=sizes, optional=PROJECTOR_KEYS),
    parameters=(
        *layers.ATTENTION,
        *layers.HEAD,
        *layers.TAPS,
        *split_columns("fc1", "adaln"),
        *split_columns("head_adaln", decays=False),  # by the "ln" in its name, which the released rule spares
        *split_rows("fc2"),
        Rule(r"(^|/)embeddings$", ROWS),
        Rule(r"(^|/)cls_token$", ("fsdp",), decays=True),
        Rule(r"(^|/)(pos_embed|target_aware_pos_embed|timesteps_embeddings)$", ("fsdp",)),
    ),
    to_8_bit=truncate,
    extent=("width", "depth"),
    published={
        (768, 20): ("reAR-S", 218.4),
        (768, 24): ("RAR-B or reAR-B", 260.9),
        (1024, 24): ("RAR-L or reAR-L", 461.7),
        (1280, 32): ("RAR-XL", 955.4),
        (1408, 40): ("RAR-XXL", 1498.5),
    },
    cached=CachedRAR,
    offers=lambda section: {TAPS: "", ORDERS: ""},
)
