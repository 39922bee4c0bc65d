"""AliTok's generators, and AR, RAR and reAR on AliTok's codes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.generators import layers
from rear_jax.generators.alitok.cached import CachedAliTok
from rear_jax.generators.alitok.network import AliTokTransformer, rotation_table
from rear_jax.generators.family import ORDERS, TAPS, GeneratorFamily
from rear_jax.generators.layers import PROJECTOR_KEYS, projector_name
from rear_jax.runtime.sharding import ROWS, Rule, split_columns, split_rows
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout, Path, TorchName, count_layers, leaf_name

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
    """Key of a parameter of `AliTokTransformer` in the authors' files.

    reAR's projectors, which these files do not have, are called as in its own.
    """
    module, *inner = path
    if module in TABLES:
        return TorchName(TABLES[module])
    if module in PROJECTOR_KEYS:
        return projector_name(path)
    prefix = f"blocks.{{i}}.{BLOCK[inner[0]]}" if module == "blocks" else MODULES[module]
    return leaf_name(prefix, inner[-1])


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of `config.model` that a file determines: its sizes, without `prefix_tokens`."""
    width = tensors["embeddings.weight"].shape[1]
    return {
        "width": width,
        "depth": count_layers(tensors, r"blocks\.(\d+)\."),
        "heads": width // tensors["blocks.0.attn.q_norm.weight"].shape[0],
        "mlp_width": tensors["blocks.0.mlp.w1.weight"].shape[0],
        "target_positions": TABLES["target_aware_pos_embed"] in tensors,
    }


def check(config: ConfigDict, num_codes: int) -> None:
    """Raises RearError unless prefix and grid are those of the tokenizer."""
    model, tokenizer = config.model, config.tokenizer
    if "prefix_tokens" in tokenizer and tokenizer.prefix_tokens != model.prefix_tokens:
        raise RearError(
            f"config.model.prefix_tokens = {model.prefix_tokens}, but config.tokenizer.prefix_tokens = "
            f"{tokenizer.prefix_tokens}: make them the same."
        )
    rotation_table(num_codes, model.width // model.heads, model.prefix_tokens)  # refuses sizes that have none


FAMILY = GeneratorFamily(
    name="alitok",
    network=AliTokTransformer,
    class_table="embeddings",
    multiplies=True,
    layout=Layout(
        signature=r"blocks\.0\.mlp\.w3\.weight",
        torch_name=torch_name,
        sizes=sizes,
        ignore=("freqs_cis",),  # a table that the authors' code keeps beside the parameters
        optional=PROJECTOR_KEYS,
    ),
    parameters=(
        *layers.ATTENTION,
        *layers.HEAD,
        *layers.TAPS,
        *split_columns("gate", "up"),
        *split_rows("down"),
        Rule(r"(^|/)embeddings$", ROWS),
        Rule(r"(^|/)target_aware_pos_embed$", ("fsdp",)),
    ),
    to_8_bit=truncate,  # its sampling code descends from RAR's
    extent=("width", "depth"),
    published={
        (768, 24): ("AliTok-B", 177.0),
        (1024, 24): ("AliTok-L", 317.9),
        (1280, 32): ("AliTok-XL", 662.1),
    },
    cached=CachedAliTok,
    offers=lambda section: {
        TAPS: "",
        ORDERS: "" if section.target_positions else "config.model.target_positions = True",
    },
    check=check,
)
