"""Janus-Pro's generator, conditioned by text that it reads itself."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.generators import layers
from rear_jax.generators.family import TOKENS, GeneratorFamily
from rear_jax.generators.interface import Tokens
from rear_jax.generators.janus.cached import CachedJanus
from rear_jax.generators.janus.files import published_names
from rear_jax.generators.janus.network import JanusTransformer
from rear_jax.runtime.sharding import ROWS, Rule, split_columns, split_rows
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import LINEAR, Layout, Path, TorchName, count_layers, leaf_name

HEAD_SIZE, MOST_LAYERS = 128, 30  # of the published models
TABLES = {"token_embeddings": "language_model.model.embed_tokens.weight", "code_embeddings": "gen_embed.weight"}
MODULES = {
    "aligner_fc1": "gen_aligner.layers.0",
    "aligner_fc2": "gen_aligner.layers.2",
    "norm": "language_model.model.norm",
    "head_fc1": "gen_head.output_mlp_projector",
    "head_fc2": "gen_head.vision_head",
}
BLOCK = {
    "attention_norm": "input_layernorm",
    "proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
QKV = TorchName("language_model.model.layers.{i}.self_attn.{part}_proj.weight", LINEAR, parts=("q", "k", "v"))
IGNORED = (  # understanding of images, the tokenizer, and tables of the rotary embeddings
    *("vision_model.", "aligner.", "gen_vision_model.", "language_model.lm_head.", "language_model.model.rotary_emb."),
    *(f"language_model.model.layers.{i}.self_attn.rotary_emb." for i in range(MOST_LAYERS)),
)


def torch_name(path: Path) -> TorchName:
    """Key of a parameter of `JanusTransformer` in the authors' files."""
    if path[0] in TABLES:
        return TorchName(TABLES[path[0]])
    *modules, leaf = path
    if modules[0] != "blocks":
        return leaf_name(MODULES[modules[0]], leaf)
    return QKV if modules[1] == "qkv" else leaf_name(f"language_model.model.layers.{{i}}.{BLOCK[modules[1]]}", leaf)


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of a config's `model` section that a file determines; without `heads` at the width of no Janus."""
    vocabulary_size, width = tensors[TABLES["token_embeddings"]].shape
    found = {
        "vocabulary_size": vocabulary_size,
        "width": width,
        "depth": count_layers(tensors, r"language_model\.model\.layers\.(\d+)\."),
        "mlp_width": tensors["language_model.model.layers.0.mlp.gate_proj.weight"].shape[0],
        "code_dim": tensors[TABLES["code_embeddings"]].shape[1],
    }
    return found | ({} if width % HEAD_SIZE else {"heads": width // HEAD_SIZE})


def check(config: ConfigDict, num_codes: int) -> None:
    """Raises RearError for sizes without rotary embeddings, and for a prompt or a padding token that cannot be."""
    model = config.model
    if model.width // model.heads % 2:
        size = model.width // model.heads
        raise RearError(f"config.model.width / config.model.heads = {size}: it must be divisible by 2.")
    if model.prompt_length < 1:
        raise RearError(f"config.model.prompt_length = {model.prompt_length}: a prompt has one token at least.")
    if not 0 <= model.pad_id < model.vocabulary_size:
        raise RearError(f"config.model.pad_id = {model.pad_id}: tokens are 0..{model.vocabulary_size - 1}.")


def example_condition(network: JanusTransformer) -> Tokens:
    """One prompt."""
    shape = 1, network.prompt_length
    return Tokens(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))


FAMILY = GeneratorFamily(
    name="janus",
    network=JanusTransformer,
    multiplies=True,
    layout=Layout(
        signature=r"gen_head\.vision_head\.weight",
        torch_name=torch_name,
        sizes=sizes,
        ignore=IGNORED,
        within={"model.": published_names},  # transformers' copies
        part=True,
    ),
    parameters=(
        *layers.ATTENTION,
        *split_columns("gate", "up", "aligner_fc1", "head_fc1", "head_fc2"),
        *split_rows("down", "aligner_fc2"),
        Rule(r"(^|/)token_embeddings$", ROWS, decays=True),
        Rule(r"(^|/)code_embeddings$", decays=True),  # half a megabyte
    ),
    to_8_bit=truncate,
    extent=("width", "depth"),
    published={(2048, 24): ("Janus-Pro-1B", 1485.1), (4096, 30): ("Janus-Pro-7B", 6591.8)},
    cached=CachedJanus,
    offers=lambda section: {TOKENS: ""},
    check=check,
    condition=example_condition,
    unconditional=lambda network, params, conditions: network.unconditional(conditions),
)
