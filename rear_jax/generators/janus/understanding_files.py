"""The published files of Janus-Pro -> its understanding side: sizes and weights.

Names are the authors': `vision_model.vision_tower.*` as in the package timm, `aligner.layers.*` and `language_model.*`.
Files of transformers are read as well. What only draws images, and SigLIP's attention pool, is left out. A file shows
its sizes but not its heads: those of the language model have 128 features, those of the image tower 64.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.errors import RearError
from rear_jax.generators import janus
from rear_jax.generators.janus.files import published_names
from rear_jax.generators.janus.understanding import Understanding
from rear_jax.runtime.identity import fingerprint
from rear_jax.weights import layout
from rear_jax.weights.layout import (
    CONV,
    LINEAR,
    OpenTensors,
    TorchName,
    count_layers,
    from_torch,
    leaf_name,
    outline,
)
from rear_jax.weights.shards import open_weights, require_bytes

VISION_HEAD_SIZE = 64
DTYPES = ("bfloat16", "float32")
WANTED = "give the whole checkpoint of Janus-Pro, such as its pytorch_model.bin"
TOWER = "vision_model.vision_tower"
POSITIONS, PATCHES = f"{TOWER}.pos_embed", f"{TOWER}.patch_embed.proj.weight"
TABLE = janus.TABLES["token_embeddings"]
FIRST_GATE = "language_model.model.layers.0.mlp.gate_proj.weight"
HEAD = "language_model.lm_head.weight"
VISION_BLOCK = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
IGNORED = (
    *("gen_embed.", "gen_aligner.", "gen_head.", "gen_vision_model.", f"{TOWER}.attn_pool."),
    *("vision_model.embeddings.position_ids", "language_model.model.rotary_emb."),
    *(key for key in janus.IGNORED if key.startswith("language_model.model.layers.")),  # more of these
)
TRANSFORMERS = "model.language_model."  # how names begin in its files
OF_TRANSFORMERS = (  # its names inside the tower -> timm's; its queries stand for queries, keys and values
    (r"^vision_model\.embeddings\.patch_embedding\.", f"{TOWER}.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", POSITIONS),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", rf"{TOWER}.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.", rf"{TOWER}.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection_layer\.", rf"{TOWER}.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", rf"{TOWER}.blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", f"{TOWER}.norm."),
)
KEYS_AND_VALUES = re.compile(r"model\.vision_model\..+\.self_attn\.[kv]_proj\.")


class Loaded(NamedTuple):
    """The understanding side with its weights.

    Attributes:
      module: the network in the sizes of the file.
      params: numpy arrays in the module's dtype.
      fingerprint: sixteen hexadecimal digits that name weights, sizes and dtype.
    """

    module: Understanding
    params: Any
    fingerprint: str


def load(path: str, *, placeholder_id: int, dtype: str = "bfloat16") -> Loaded:
    """The understanding side in a published file, read tensor by tensor.

    Args:
      path: a `.safetensors` or `.bin` file, an index of shards, or the folder that has them.
      placeholder_id: of the vocabulary, see `Understanding`.
      dtype: of the weights and of the products, one of `DTYPES`.

    Raises RearError: a file is missing, damaged, or has no understanding side, or the dtype is another one.
    """
    tensors = open_understanding(path)
    module = network_of(tensors, placeholder_id=placeholder_id, dtype=dtype, source=path)
    require_bytes(path, sum(leaf.size for leaf in jax.tree.leaves(shapes(module))))
    params = params_from(tensors, module, source=path)
    found = {name: getattr(module, name) for name in sizes(tensors, source=path)}
    return Loaded(module, params, fingerprint(params, found | {"dtype": dtype}))


def open_understanding(path: str) -> Mapping[str, np.ndarray]:
    """The tensors of a file, of the authors or of transformers, in the authors' names; errors as of `open_weights`."""
    tensors = open_weights(path)
    return _InAuthorsNames(tensors) if any(key.startswith(TRANSFORMERS) for key in tensors) else tensors


class _InAuthorsNames(OpenTensors):
    """The tensors of a file of transformers, queries, keys and values of a block of the tower as one."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._names = {_authors_name(key): key for key in tensors if not KEYS_AND_VALUES.match(key)}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._made(key, self._tensors, np.concatenate)

    def outline(self) -> dict[str, np.ndarray]:
        shapes = outline(self._tensors)
        return {key: self._made(key, shapes, lambda parts, key=key: layout.joined(parts, key)) for key in self}

    def _made(
        self, key: str, tensors: Mapping[str, np.ndarray], join: Callable[[list[np.ndarray]], np.ndarray]
    ) -> np.ndarray:
        name = self._names[key]
        if key == POSITIONS:
            return tensors[name][None]
        if ".attn.qkv." not in key:
            return tensors[name]
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if missing := [part for part in parts if part not in tensors]:
            raise RearError(f"A Janus of transformers lacks {missing[0]}: fetch the file again.")
        return join([tensors[part] for part in parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _authors_name(key: str) -> str:
    """The authors' name of a tensor of transformers; a name that is none of its names stays."""
    name = published_names(key) or key
    for pattern, instead in OF_TRANSFORMERS:
        name = re.sub(pattern, instead, name)
    return name


def network_of(
    tensors: Mapping[str, np.ndarray],
    *,
    placeholder_id: int,
    dtype: str = "bfloat16",
    source: str = "the state dict",
) -> Understanding:
    """The network with the sizes of a file; only shapes are looked at. Arguments and errors as of `load`."""
    if dtype not in DTYPES:
        raise RearError(f"Janus answers in {' or '.join(DTYPES)}, not in {dtype!r}: choose one of them.")
    found = sizes(tensors, source=source)
    if not {"heads", "vision_heads"} <= found.keys():
        widths = f"widths {found['width']} and {found['vision_width']}"
        raise RearError(f"{source} is a Janus of {widths}, whose heads are not known here: {WANTED}.")
    module = Understanding(**found, placeholder_id=placeholder_id, dtype=jnp.dtype(dtype))
    layout.require_fit(outline(tensors), shapes(module), torch_name, ignore=IGNORED, source=source)
    return module


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, int]:
    """The sizes of `Understanding` by the shapes in a file; without heads at widths that no Janus has.

    Raises RearError: the file has no understanding side.
    """
    found = {key: tensor.shape for key, tensor in outline(tensors).items()}
    if missing := [key for key in (TABLE, FIRST_GATE, POSITIONS, PATCHES, HEAD) if key not in found]:
        raise RearError(f"{source} cannot answer about images: it lacks {missing[0]}. Here, {WANTED}.")
    table, gate, positions, patches = (found[key] for key in (TABLE, FIRST_GATE, POSITIONS, PATCHES))
    if [len(shape) for shape in (table, gate, positions, patches)] != [2, 2, 3, 4] or 0 in (*table, *positions):
        raise RearError(f"{source} cannot answer about images: its layers have other shapes. Here, {WANTED}.")
    width, vision_width = table[1], positions[2]
    of_heads = {"heads": width // janus.HEAD_SIZE, "vision_heads": vision_width // VISION_HEAD_SIZE}
    whole = {"heads": width % janus.HEAD_SIZE == 0, "vision_heads": vision_width % VISION_HEAD_SIZE == 0}
    return {
        "vocabulary_size": table[0],
        "width": width,
        "depth": count_layers(found, r"language_model\.model\.layers\.(\d+)\."),
        "mlp_width": gate[0],
        "vision_width": vision_width,
        "vision_depth": count_layers(found, r"vision_model\.vision_tower\.blocks\.(\d+)\."),
        "image_size": math.isqrt(positions[1]) * patches[2],
        "patch_size": patches[2],
    } | {name: count for name, count in of_heads.items() if whole[name]}


def params_from(tensors: Mapping[str, np.ndarray], module: Understanding, *, source: str = "the state dict") -> Any:
    """The parameters from a state dict, numpy arrays in the module's dtype.

    Raises RearError: a tensor is missing, unexpected, of another shape, or holds a number that is not finite.
    """
    return from_torch(tensors, shapes(module), torch_name, ignore=IGNORED, source=source)


def shapes(module: Understanding) -> Any:
    """The parameters as `jax.ShapeDtypeStruct`, in the module's dtype: they are not trained."""
    size = module.image_size
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    found = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, module.dtype), found)


def torch_name(path: layout.Path) -> TorchName:
    """Key of a parameter of `Understanding` in the authors' files."""
    part, *rest = path
    if part == "tower":
        return _tower_name(*rest)
    if part == "aligner":
        return leaf_name(f"aligner.layers.{rest[0].removeprefix('layer')}", rest[1])
    return TorchName(HEAD, LINEAR) if part == "lm_head" else janus.torch_name(path)


def _tower_name(module: str, *rest: str) -> TorchName:
    if module == "pos_embed":
        return TorchName(POSITIONS)
    if module == "patch_embed":
        return TorchName(PATCHES, CONV) if rest[0] == "kernel" else TorchName(f"{TOWER}.patch_embed.proj.bias")
    if module == "norm":
        return leaf_name(f"{TOWER}.norm", rest[0])
    layer, leaf = rest
    return leaf_name(f"{TOWER}.blocks.{{i}}.{VISION_BLOCK.get(layer, layer)}", leaf)
