"""Attention of whole short sequences on TPUs, dropout of attention weights included, as one Pallas kernel.

A grid step takes the queries, keys and values of one image into the chip's fast memory, goes through its heads, and
writes their outputs. Normalisation, rotation, products, softmax and dropout happen there, and nothing of [T, T] ever
goes to main memory. The backward kernel computes all of it again from the same projection. This is what reAR and RAR
train with, and no library has: the mask of dropout is the hash of `dropout.py`, bit for bit that of the plain form.

What happens on the chip is in `fused_kernels.py`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from rear_jax.generators import fused_kernels
from rear_jax.generators.fused_kernels import LANES, Shape
from rear_jax.generators.heads import Preparation

LONGEST = 1026  # positions


def fused_attention(
    qkv: Float[Array, "B T W3"],
    preparation: Preparation,
    heads: int,
    *,
    visible: Bool[Array, "B T"] | None = None,
    blocks: Sequence[int] = (),
    rate: float = 0.0,
    words: Int32[Array, "B H 2"] | None = None,
    precision: Any = None,
    memory: int = 128 * 2**20,
    interpret: bool = False,
) -> Float[Array, "B T W"]:
    """Causal softmax attention on one device; softmax in float32.

    Args:
      qkv: queries, keys and values of all heads, side by side.
      preparation: of queries and keys.
      heads: H.
      visible: positions that others may see; each sees itself in any case. None = all.
      blocks: lengths of the parts of a sequence, where a position sees its whole part and those before it.
      rate, words: of dropout of attention weights; the words of `Dropout.of_heads`.
      precision: of products of float32.
      memory: bytes of the chip's fast memory.
      interpret: run the kernel's Python on any platform, slowly.
    """
    _, length, width = qkv.shape
    rate = 0.0 if words is None else rate
    size, itemsize = width // 3 // heads, qkv.dtype.itemsize
    distance = 1 if preparation.rotation is None else preparation.rotation.distance(size)
    shape = Shape(heads, size, length, rate, tuple(blocks), precision, itemsize, memory, distance)
    words = jnp.zeros((1,), jnp.int32) if words is None else words.reshape(-1)
    visible = None if visible is None else visible.astype(jnp.float32)[:, None]
    return _attention(qkv, Inputs(_columns(preparation), _turns(preparation), visible, words), shape, interpret)


class Inputs(NamedTuple):
    """What the kernels read besides the projection; a part that is None is not there.

    Attributes:
      norms: [D, n]: scale of queries and of keys, then both biases.
      turns: [2, b, D, T] float32, b = 1 or B: cosine, and sine with the sign that the other feature of the pair has.
      visible: [B, 1, T] float32, 1 or 0.
      words: [B H 2] int32.
    """

    norms: jax.Array | None
    turns: jax.Array | None
    visible: jax.Array | None
    words: jax.Array


def _columns(preparation: Preparation) -> jax.Array | None:
    if preparation.queries is None:
        return None
    (q_scale, q_bias), (k_scale, k_bias) = preparation.queries, preparation.keys
    columns = [q_scale, k_scale] if q_bias is None else [q_scale, k_scale, q_bias, k_bias]
    return jnp.stack(columns, axis=1)


def _turns(preparation: Preparation) -> jax.Array | None:
    if preparation.rotation is None:
        return None
    cos, sin = (x if x.ndim == 3 else x[None] for x in preparation.rotation)  # [b, T, D/2]
    joined = preparation.rotation.joined
    return jnp.stack([joined(cos, cos), joined(-sin, sin)]).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attention(qkv, inputs, shape, interpret):
    return _forward(qkv, inputs, shape, interpret)[0]


def _forward(qkv, inputs, shape, interpret):
    out = jax.ShapeDtypeStruct((*qkv.shape[:2], shape.width), qkv.dtype)
    return _call("forward", shape, {"qkv": qkv}, inputs, [out], interpret)[0], (qkv, inputs)


def _backward(shape, interpret, residuals, gradient):
    qkv, inputs = residuals
    outs = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    if inputs.norms is not None:
        outs.append(jax.ShapeDtypeStruct((len(qkv), shape.size, LANES), jnp.float32))
    arrays = {"qkv": qkv, "gradient": gradient}
    of_qkv, *of_norms = _call("backward", shape, arrays, inputs, outs, interpret)
    norms = of_norms[0].sum(0)[:, : inputs.norms.shape[1]] if of_norms else None
    turns, visible = (None if x is None else jnp.zeros_like(x) for x in (inputs.turns, inputs.visible))
    return of_qkv, Inputs(norms, turns, visible, np.zeros(inputs.words.shape, jax.dtypes.float0))


_attention.defvjp(_forward, _backward)

KERNELS = {  # name -> kernel, products of a score, heads [D, T] that it reads and that it makes
    "forward": (fused_kernels.forward, 2, 3, 1),
    "backward": (fused_kernels.backward, 5, 4, 3),
}


def _call(name: str, shape: Shape, arrays: dict, inputs: Inputs, outs: list, interpret: bool) -> list[jax.Array]:
    """Runs a kernel on every image."""
    kernel, products, read, made = KERNELS[name]
    more = {"norms": inputs.norms, "turns": inputs.turns, "visible": inputs.visible}
    arrays = arrays | {name: x for name, x in more.items() if x is not None}
    return pl.pallas_call(
        functools.partial(kernel, shape, tuple(arrays)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(arrays["qkv"]),),
            in_specs=[_window(name, x.shape) for name, x in arrays.items()],
            out_specs=[_window("", out.shape) for out in outs],
            scratch_shapes=[pltpu.VMEM((n, shape.group, shape.size, shape.length), jnp.float32) for n in (read, made)],
        ),
        out_shape=outs,
        interpret=interpret,
        name=f"fused_attention_{name}",
        cost_estimate=_cost(shape, products, len(arrays["qkv"]), [*arrays.values(), *outs]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=shape.needed),
    )(inputs.words, *arrays.values())


def _window(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    """The part of an array that belongs to an image; all of it where it is for every image."""
    if name == "norms":
        return pl.BlockSpec(shape, lambda i, words: (0, 0))
    if name == "turns":
        return pl.BlockSpec((2, 1, *shape[2:]), lambda i, words: (0, i if shape[1] > 1 else 0, 0, 0))
    return pl.BlockSpec((1, *shape[1:]), lambda i, words: (i, 0, 0))


def _cost(shape: Shape, products: int, images: int, arrays: Sequence[Any]) -> pl.CostEstimate:
    """What a kernel computes, of the scores that it does compute, and what it moves."""
    scores = images * shape.heads * sum((part.end - part.start) * part.keys for part in shape.parts())
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * shape.size * scores, transcendentals=scores, bytes_accessed=moved)
