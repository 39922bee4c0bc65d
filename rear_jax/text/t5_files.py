"""The published files of T5 v1.1 and flan-T5, in Hugging Face's layout: sizes and weights of their encoder.

Such a file also holds the decoder, which is left out. All published networks have heads of 64 features. In small, 6
such heads make 384 features where the width is 512, so the head size is read from the shapes and not from the width.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime.identity import fingerprint
from rear_jax.text.t5 import T5Encoder, check_dtype
from rear_jax.weights import layout
from rear_jax.weights.layout import LINEAR, TorchName, count_layers, from_torch, outline
from rear_jax.weights.shards import open_weights, require_bytes

IGNORED = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last is `shared` once more
TABLE = "shared.weight"
FIRST = "encoder.block.0.layer"
BIASES = f"{FIRST}.0.SelfAttention.relative_attention_bias.weight"
FIRST_QUERY = f"{FIRST}.0.SelfAttention.q.weight"
FIRST_GATE = f"{FIRST}.1.DenseReluDense.wi_0.weight"
BUCKETS = range(8, 512, 4)  # those that distances up to 128 can fill
UNGATED = f"{FIRST}.1.DenseReluDense.wi.weight"  # of T5 v1.0
WHOLE = {
    ("token_embeddings",): TABLE,
    ("relative_bias",): BIASES,
    ("norm", "scale"): "encoder.final_layer_norm.weight",
}
BLOCK = {
    "attention_norm": "0.layer_norm",
    "q": "0.SelfAttention.q",
    "k": "0.SelfAttention.k",
    "v": "0.SelfAttention.v",
    "proj": "0.SelfAttention.o",
    "mlp_norm": "1.layer_norm",
    "gate": "1.DenseReluDense.wi_0",
    "up": "1.DenseReluDense.wi_1",
    "down": "1.DenseReluDense.wo",
}


class LoadedEncoder(NamedTuple):
    """An encoder with its weights.

    Attributes:
      module: the network in the sizes of the file.
      params: numpy arrays in the module's dtype.
      fingerprint: sixteen hexadecimal digits that name weights, sizes and dtype.
    """

    module: T5Encoder
    params: Any
    fingerprint: str


def load(path: str, dtype: Any = jnp.bfloat16) -> LoadedEncoder:
    """The encoder in a published file, read tensor by tensor: memory holds the result and one tensor more.

    Args:
      path: a `.safetensors` or `.bin` file, an index of shards, or the folder that has them.
      dtype: of the weights and of the products, bfloat16 or float32.

    Raises RearError: a file is missing, damaged or of another network, or T5 does not compute in `dtype`.
    """
    check_dtype(dtype)
    tensors = open_weights(path)
    module = T5Encoder(**sizes(tensors, source=path), dtype=jnp.dtype(dtype))
    require_bytes(path, sum(leaf.size for leaf in jax.tree.leaves(shapes(module))))
    params = params_from(tensors, module, source=path)
    return LoadedEncoder(module, params, _fingerprint(module, params))


def sizes(tensors: Mapping[str, np.ndarray], *, source: str = "the state dict") -> dict[str, int]:
    """The sizes of `T5Encoder` by the shapes in a file: all but `max_distance`, which is 128 in every published one.

    Raises RearError: the file is of another network.
    """
    found = {key: tensor.shape for key, tensor in outline(tensors).items()}
    if UNGATED in found:
        raise RearError(f"{source} is T5 v1.0, whose MLP has no gate: give T5 v1.1 or flan-T5.")
    if missing := [key for key in (TABLE, BIASES, FIRST_QUERY, FIRST_GATE) if key not in found]:
        raise RearError(f"{source} has no encoder of T5 v1.1 or flan-T5: it lacks {missing[0]}. Give such a file.")
    table, biases, query, gate = (found[key] for key in (TABLE, BIASES, FIRST_QUERY, FIRST_GATE))
    if {len(shape) for shape in (table, biases, query, gate)} != {2} or 0 in (*table, *biases, *query, *gate):
        raise RearError(f"{source} has no encoder of T5 v1.1 or flan-T5: its layers are no matrices. Give such a file.")
    (buckets, heads), inner = biases, query[0]
    if inner % heads or buckets not in BUCKETS:
        told = f"{heads} heads share {inner} features and {buckets} buckets"
        raise RearError(f"{source} has no encoder of T5 v1.1 or flan-T5: {told}. Give such a file.")
    return {
        "vocabulary_size": table[0],
        "width": table[1],
        "depth": count_layers(found, r"encoder\.block\.(\d+)\."),
        "heads": heads,
        "head_size": inner // heads,
        "mlp_width": gate[0],
        "buckets": buckets,
    }


def params_from(tensors: Mapping[str, np.ndarray], module: T5Encoder, *, source: str = "the state dict") -> Any:
    """The parameters of an encoder from a state dict, numpy arrays in the module's dtype.

    Raises RearError: a tensor is missing, unexpected, of another shape, or holds a number that is not finite.
    """
    return from_torch(tensors, shapes(module), torch_name, ignore=IGNORED, source=source)


def shapes(module: T5Encoder) -> Any:
    """The parameters as `jax.ShapeDtypeStruct`, in the module's dtype: an encoder is not trained."""
    text = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    found = jax.eval_shape(module.init, jax.random.key(0), *text)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, module.dtype), found)


def torch_name(path: layout.Path) -> TorchName:
    """Key of a parameter of `T5Encoder` in the published files."""
    if path in WHOLE:
        return TorchName(WHOLE[path])
    _, layer, leaf = path
    return TorchName(f"encoder.block.{{i}}.layer.{BLOCK[layer]}.weight", LINEAR if leaf == "kernel" else None)


def _fingerprint(module: T5Encoder, params: Any) -> str:
    names = ("vocabulary_size", "width", "depth", "heads", "head_size", "mlp_width", "buckets", "max_distance")
    return fingerprint(params, {name: getattr(module, name) for name in names} | {"dtype": module.dtype.name})
