"""Published files of CLIP and HPSv2 -> network and parameters.

Two layouts are read. Hugging Face's has `vision_model.*` and `text_model.*` (`openai/clip-vit-base-patch32` and
others). open_clip's has `visual.*` and `transformer.*`; OpenAI's own state dicts and the files of HPSv2,
`HPS_v2_compressed.pt` and `HPS_v2.1_compressed.pt`, have it too.

A file shows its sizes, but neither its heads nor its activation: both follow from the width of the image tower. Width
768 (ViT-B) and 1024 (ViT-L) are taken to be OpenAI's weights, with x·sigmoid(1.702x); width 1280 (ViT-H-14) is
open_clip's, with the exact GELU. LAION's ViT-B and ViT-L have the exact GELU and the sizes of OpenAI's: nothing tells
them apart, and their scores would be wrong.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.errors import UNREADABLE, RearError
from rear_jax.metrics.clip import CLIP, Tower
from rear_jax.weights.layout import (
    CONV,
    LINEAR,
    Layout,
    OpenTensors,
    Path,
    TorchName,
    count_layers,
    from_torch,
    joined,
    leaf_name,
    outline,
)
from rear_jax.weights.shards import open_weights

HEAD_SIZE = 64  # of the text towers
IMAGE_TOWERS = {768: (12, "quick_gelu"), 1024: (16, "quick_gelu"), 1280: (16, "gelu")}  # width -> heads, activation
WANTED = "give OpenAI's ViT-B/32 or ViT-L/14, open_clip's ViT-H-14 or a file of HPSv2"
QKV = re.compile(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)")  # of Hugging Face

# module -> its name in a block of Hugging Face's files, and of open_clip's
BLOCK = {
    "ln_1": ("layer_norm1", "ln_1"),
    "in_proj": ("self_attn.qkv_proj", "attn.in_proj"),
    "out_proj": ("self_attn.out_proj", "attn.out_proj"),
    "ln_2": ("layer_norm2", "ln_2"),
    "c_fc": ("mlp.fc1", "mlp.c_fc"),
    "c_proj": ("mlp.fc2", "mlp.c_proj"),
}
# parameter outside the blocks -> its place in Hugging Face's files, and in open_clip's
OUTSIDE = {
    ("image", "class_embedding"): ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("image", "positional_embedding"): (
        "vision_model.embeddings.position_embedding.weight",
        "visual.positional_embedding",
    ),
    ("image", "patch_embed"): ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("image", "ln_pre"): ("vision_model.pre_layrnorm", "visual.ln_pre"),  # Hugging Face's spelling
    ("image", "ln_post"): ("vision_model.post_layernorm", "visual.ln_post"),
    ("image", "proj"): ("visual_projection", "visual.proj"),
    ("text", "token_embedding"): ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text", "positional_embedding"): ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text", "ln_final"): ("text_model.final_layer_norm", "ln_final"),
    ("text", "proj"): ("text_projection", "text_projection"),
}
BLOCKS = {
    "image": ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    "text": ("text_model.encoder.layers", "transformer.resblocks"),
}


def load(path: str, *, precision: str = "highest") -> tuple[CLIP, Any]:
    """The network of a published file and its parameters, float32 numpy; `precision` is as of `CLIP`.

    Raises RearError: the file is missing, damaged, or of no CLIP that is known here.
    """
    tensors = open_weights(path)
    network = network_of(tensors, source=path).clone(precision=precision)
    return network, params_from(tensors, network, source=path)


def network_of(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> CLIP:
    """The network with the sizes of a file; only shapes are looked at.

    Raises RearError: the tensors are of no CLIP, or of one of a width that is not known here.
    """
    sizes = sizes_of(tensors, source=source)
    if sizes["vision_width"] not in IMAGE_TOWERS or sizes["text_width"] % HEAD_SIZE:
        widths = f"widths {sizes['vision_width']} and {sizes['text_width']}"
        raise RearError(f"{source} is a CLIP of {widths}, which is not known here: {WANTED}.")
    heads, activation = IMAGE_TOWERS[sizes["vision_width"]]
    return make(sizes, vision_heads=heads, text_heads=sizes["text_width"] // HEAD_SIZE, activation=activation)


def make(sizes: Mapping[str, int], *, vision_heads: int, text_heads: int, activation: str) -> CLIP:
    """The network from what a file shows, `sizes_of`, and what it does not."""
    return CLIP(
        embedding_dim=sizes["embedding_dim"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        vision=Tower(sizes["vision_width"], sizes["vision_depth"], vision_heads),
        words=Tower(sizes["text_width"], sizes["text_depth"], text_heads),
        vocab_size=sizes["vocab_size"],
        context_length=sizes["context_length"],
        activation=activation,
    )


def sizes_of(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, int]:
    """What the shapes of a file say; raises RearError where it is no CLIP's."""
    shapes = outline(tensors)
    try:
        return layout_of(shapes, source).sizes(shapes)
    except UNREADABLE as error:
        raise RearError(f"{source} is not a whole CLIP ({error}): {WANTED}.") from None


def params_from(tensors: Mapping[str, np.ndarray], network: CLIP, *, source: str = "the state dict") -> Any:
    """The parameters of a network from a state dict of either layout.

    Raises RearError: a tensor is missing, unexpected or of another shape.
    """
    layout = layout_of(tensors, source)
    tensors = FusedTensors(tensors) if layout is HUGGING_FACE else tensors
    return from_torch(tensors, param_shapes(network), layout.torch_name, ignore=layout.ignore, source=source)


def param_shapes(network: CLIP) -> Any:
    """Shapes and dtypes of the parameters of a network."""
    pixels = jax.ShapeDtypeStruct((1, network.image_size, network.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, network.context_length), jnp.int32)
    return jax.eval_shape(network.init, jax.random.key(0), pixels, ids)["params"]


def layout_of(tensors: Mapping[str, np.ndarray], source: str) -> Layout:
    """The layout of a state dict, by its keys; raises RearError where it is neither."""
    for layout in (HUGGING_FACE, OPEN_CLIP):
        if any(re.match(layout.signature, key) for key in tensors):
            return layout
    raise RearError(f"{source} is no CLIP, it has no keys vision_model.* or visual.transformer.*: {WANTED}.")


class FusedTensors(OpenTensors):
    """Tensors of Hugging Face's layout with queries, keys and values of a block as one layer, `qkv_proj`.

    They are read when they are asked for. A layer of which a part is missing is missing.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._keys: dict[str, list[str]] = {}  # its keys -> those of the file that make it up
        for key in tensors:
            match = QKV.fullmatch(key)
            if not match:
                self._keys[key] = [key]
                continue
            parts = [f"{match[1]}.{part}_proj.{match[3]}" for part in "qkv"]
            if all(part in tensors for part in parts):
                self._keys[f"{match[1]}.qkv_proj.{match[3]}"] = parts

    def __getitem__(self, key: str) -> np.ndarray:
        parts = [self._tensors[part] for part in self._keys[key]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def outline(self) -> dict[str, np.ndarray]:
        shapes = outline(self._tensors)
        return {
            key: joined([shapes[part] for part in parts], key) if len(parts) > 1 else shapes[parts[0]]
            for key, parts in self._keys.items()
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def torch_name(path: Path, publisher: int) -> TorchName:
    """Where a parameter lies in the files of a publisher: 0 is Hugging Face (as `FusedTensors`), 1 is open_clip."""
    tower, *modules, leaf = path
    if modules[:1] == ["blocks"]:
        place = f"{BLOCKS[tower][publisher]}.{{i}}.{BLOCK[modules[1]][publisher]}"
        if place.endswith(".in_proj"):  # PyTorch's MultiheadAttention has no layer there
            return TorchName(f"{place}_weight", LINEAR) if leaf == "kernel" else TorchName(f"{place}_bias")
        return leaf_name(place, leaf)
    module = modules[0] if modules else leaf
    place = OUTSIDE[tower, module][publisher]
    if not modules or (module == "proj" and publisher == 1):  # a bare array, [W, E] of a projection
        return TorchName(place)
    return TorchName(f"{place}.weight", CONV) if module == "patch_embed" else leaf_name(place, leaf)


def sizes(tensors: Mapping[str, np.ndarray], publisher: int) -> dict[str, int]:
    """What the shapes say; arguments as of `torch_name`.

    Raises:
      KeyError: a tensor is not there.
      ValueError: one has another number of axes.
    """
    place = {parameter: names[publisher] for parameter, names in OUTSIDE.items()}
    vision_width, _, patch_size, _ = tensors[f"{place['image', 'patch_embed']}.weight"].shape
    positions, _ = tensors[place["image", "positional_embedding"]].shape
    vocab_size, text_width = tensors[place["text", "token_embedding"]].shape
    context_length, _ = tensors[place["text", "positional_embedding"]].shape
    projection = tensors[place["text", "proj"] + (".weight", "")[publisher]].shape
    depths = {
        tower: count_layers(tensors, re.escape(names[publisher]) + r"\.(\d+)\.") for tower, names in BLOCKS.items()
    }
    return {
        "embedding_dim": projection[publisher],
        "image_size": math.isqrt(positions - 1) * patch_size,
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_depth": depths["image"],
        "text_width": text_width,
        "text_depth": depths["text"],
        "vocab_size": vocab_size,
        "context_length": context_length,
    }


HUGGING_FACE = Layout(
    signature=r"vision_model\.encoder\.",
    torch_name=functools.partial(torch_name, publisher=0),
    sizes=functools.partial(sizes, publisher=0),
    ignore=("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
)
OPEN_CLIP = Layout(
    signature=r"visual\.transformer\.",
    torch_name=functools.partial(torch_name, publisher=1),
    sizes=functools.partial(sizes, publisher=1),
    ignore=("logit_scale", "attn_mask", "input_resolution", "context_length", "vocab_size"),
)
