"""LlamaGen's generators, conditioned by class or by text."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.generators import layers
from rear_jax.generators.family import CAPTIONS, GeneratorFamily
from rear_jax.generators.interface import Captions
from rear_jax.generators.llamagen.cached import CachedLlamaGen
from rear_jax.generators.llamagen.network import CONDITIONS, LlamaGenTransformer, rotation_table
from rear_jax.runtime.sharding import ROWS, Rule, split_columns, split_rows
from rear_jax.weights.family import round_half_up
from rear_jax.weights.layout import LINEAR, Layout, Path, TorchName, count_layers

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
    """Key of a parameter of `LlamaGenTransformer` in the authors' files."""
    if path[0] in TABLES:
        return TorchName(TABLES[path[0]])
    *modules, leaf = path
    prefix = f"layers.{{i}}.{BLOCK[modules[1]]}" if modules[0] == "blocks" else MODULES[modules[0]]
    return TorchName(f"{prefix}.weight", LINEAR if leaf == "kernel" else None)


def sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The keys of a config's `model` section that a file determines.

    Without `heads` where the width is none of a published model, and without the caption's sizes in a class-conditional
    file.
    """
    width = tensors["tok_embeddings.weight"].shape[1]
    mlp_width = tensors["layers.0.feed_forward.w1.weight"].shape[0]
    found = {"width": width, "depth": count_layers(tensors, r"layers\.(\d+)\."), "mlp_width": mlp_width}
    if "cls_embedding.embedding_table.weight" in tensors:
        found["condition"] = "class"
    else:
        length, dim = tensors["cls_embedding.uncond_embedding"].shape
        found |= {"condition": "text", "caption_length": length, "caption_dim": dim}
    if width in WIDE_HEADS or width % 64 == 0:
        found["heads"] = WIDE_HEADS.get(width, width // 64)
    return found


def check(config: ConfigDict, num_codes: int) -> None:
    """Raises RearError for an unknown condition, and for sizes without rotary embeddings."""
    model = config.model
    if model.condition not in CONDITIONS:
        raise RearError(f"config.model.condition = {model.condition!r}: use one of {', '.join(CONDITIONS)}.")
    rotation_table(num_codes, model.width // model.heads, prefix_length=1)


def example_condition(network: LlamaGenTransformer):
    """A label, or one caption."""
    if network.condition == "class":
        return jnp.zeros(1, jnp.int32)
    shape = 1, network.caption_length
    return Captions(jnp.zeros((*shape, network.caption_dim), jnp.float32), jnp.ones(shape, bool))


def unconditional(network: LlamaGenTransformer, params: Any, conditions: Any):
    """The null label, or the null caption under the mask of each caption.

    The null caption is as it was drawn at the start: LlamaGen does not train it.
    """
    if network.condition == "class":
        return jnp.full_like(conditions, network.num_classes)
    null = jax.lax.stop_gradient(params["null_caption"])
    return Captions(jnp.broadcast_to(null, conditions.features.shape), conditions.mask)


FAMILY = GeneratorFamily(
    name="llamagen",
    network=LlamaGenTransformer,
    class_table="class_embeddings",
    multiplies=True,
    layout=Layout(
        signature=r"cls_embedding\.(embedding_table\.weight|uncond_embedding)",
        torch_name=torch_name,
        sizes=sizes,
        ignore=("freqs_cis", "causal_mask"),  # tables that the authors' code keeps beside the parameters
        under="model",
    ),
    parameters=(
        *layers.ATTENTION,
        *layers.HEAD,
        *split_columns("gate", "up", "caption_fc1"),
        *split_rows("down", "caption_fc2"),
        Rule(r"(^|/)(code_embeddings|class_embeddings)$", ROWS, decays=True),
        Rule(r"(^|/)null_caption$", ("fsdp",)),
    ),
    to_8_bit=round_half_up,
    extent=("condition", "width", "depth"),
    published={
        ("class", 768, 12): ("LlamaGen-B", 110.9),
        ("class", 1024, 24): ("LlamaGen-L", 342.9),
        ("class", 1280, 36): ("LlamaGen-XL", 774.7),
        ("class", 1536, 48): ("LlamaGen-XXL", 1411.0),
        ("class", 3200, 24): ("LlamaGen-3B", 3096.7),
        ("text", 1280, 36): ("LlamaGen-XL, text-conditional", 777.9),
    },
    cached=CachedLlamaGen,
    offers=lambda section: {CAPTIONS: "" if section.condition == "text" else "config.model.condition = 'text'"},
    needs_grid=True,
    check=check,
    condition=example_condition,
    unconditional=unconditional,
)
