"""Checksums of arrays: a checkpoint keeps them, so that values which changed on disk are noticed when it is read.

A checksum is the sum of an array's bits, taken as unsigned integers and each multiplied by an odd number of its own,
modulo 2^32. Any single bit that flips changes it. Such a sum has no rounding: it does not depend on the mesh.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Checksums = dict[str, list]  # path of an array -> its dtype and its checksum; of the record: its digest


def of_arrays(tree: Any) -> Checksums:
    """The checksum of every array, one after the other; all processes that share the arrays must ask."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name_of(path): [str(leaf.dtype), int(_checksum(leaf))] for path, leaf in leaves}


def of_record(record: dict) -> str:
    """Sixteen hexadecimal digits that name a record's values."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def first_differing(tree: Any, saved: Checksums) -> str:
    """The path of the first array whose checksum is not the saved one, or ''.

    All processes that share the arrays must ask. An array without a saved checksum of its dtype is passed over.
    """
    for name, (dtype, found) in of_arrays(tree).items():
        if isinstance(kept := saved.get(name), list) and kept[:1] == [dtype] and kept[1:] != [found]:
            return name
    return ""


def _name_of(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _checksum(values: jax.Array) -> jax.Array:
    """uint32 []; written without a reshape, which would move the parts of a divided array."""
    if values.dtype == jnp.bool_:
        bits = values.astype(jnp.uint32)
    else:
        bits = lax.bitcast_convert_type(values, f"uint{8 * min(values.dtype.itemsize, 4)}").astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis in range(bits.ndim):
        stride = math.prod(bits.shape[axis + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
