"""LayerNorm with a modulation, gates and dropout: what RAR's blocks do between their products (arXiv 2411.00776).

A block has six vectors for each position, side by side in one array [B, T, 6W]. Between two products it adds what came
out, gated, to the residual stream, then normalises the stream and modulates it. Here that is one function each, of
whole sequences. On a TPU each is a kernel of `modulated_kernels.py`, forward and backward: it does at
once what XLA does in several passes over the activations (benchmarks/TPU.md).

The functions hand on the modulation that they were given. So gradients of its parts go into one array, which the last
function makes and each one before it completes: no six arrays are joined. The order of a block must therefore be kept:
`norm`, `add_gated_norm`, `add_gated`.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int32

from rear_jax.generators import modulated_kernels as kernels
from rear_jax.generators.attention_kernels import fast_memory
from rear_jax.generators.dropout import Dropout, drop
from rear_jax.generators.modulated_kernels import (
    GATE_ATTENTION,
    GATE_MLP,
    SCALE_ATTENTION,
    SCALE_MLP,
    SHIFT_ATTENTION,
    SHIFT_MLP,
    standardised,
)
from rear_jax.runtime.precision import in_float32, platform
from rear_jax.runtime.sharding import BATCH_AXES, dividing


class Affine(nn.Module):
    """Scale and bias of a LayerNorm, [2, W] float32."""

    @nn.compact
    def __call__(self, width: int) -> Float[Array, "2 W"]:
        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        return jnp.stack([scale, self.param("bias", nn.initializers.zeros, (width,), jnp.float32)])


class Way(NamedTuple):
    """How these functions are computed.

    Attributes:
      fused: by the kernels, else in their plain form.
      interpret: run the kernels' Python on any platform, slowly.
    """

    fused: bool
    interpret: bool = False

    @classmethod
    def of(cls, attention: str, width: int) -> "Way":
        """That of a block of this width; `config.model.attention` = 'plain' asks for no kernel of ours."""
        return cls(attention != "plain" and platform() == "tpu" and width % kernels.LANES == 0)


def layer_norm(
    x: Float[Array, "... W"],
    affine: Float[Array, "2 W"] | None,
    shift: Float[Array, "... W"],
    scale: Float[Array, "... W"],
) -> Float[Array, "... W"]:
    """norm(x)·(1 + scale) + shift in float32, in the dtype of the modulation; the norm has an affine part or none."""

    def function(x, shift, scale, *affine):
        y, _ = standardised(x)
        y = y * affine[0][0] + affine[0][1] if affine else y
        return y * (1.0 + scale) + shift

    return in_float32(function, shift.dtype)(x, shift, scale, *(() if affine is None else (affine,)))


def norm(
    x: Float[Array, "B T W"], affine: Float[Array, "2 W"], modulation: Float[Array, "B T 6W"], way: Way
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"], Float[Array, "B T 6W"]]:
    """(the normalised x with shift and scale of attention; x and the modulation, to be handed on)."""
    if way.fused:
        return _norm(x, affine, modulation, way)
    parts = jnp.split(modulation, 6, axis=-1)
    return layer_norm(x, affine, parts[SHIFT_ATTENTION], parts[SCALE_ATTENTION]), x, modulation


def add_gated_norm(
    x: Float[Array, "B T W"],
    mixed: Float[Array, "B T W"],
    affine: Float[Array, "2 W"],
    modulation: Float[Array, "B T 6W"],
    rate: float,
    dropout: Dropout | None,
    way: Way,
) -> tuple[Float[Array, "B T W"], Float[Array, "B T W"], Float[Array, "B T 6W"]]:
    """(x plus the gated output of attention; the same normalised, with shift and scale of the MLP; the modulation)."""
    if way.fused:
        return _add_gated_norm(x, mixed, affine, modulation, *_places(rate, dropout, len(x)), way)
    parts = jnp.split(modulation, 6, axis=-1)
    x = _plain_gate(x, parts[GATE_ATTENTION], drop(mixed, rate, dropout))
    return x, layer_norm(x, affine, parts[SHIFT_MLP], parts[SCALE_MLP]), modulation


def add_gated(
    x: Float[Array, "B T W"],
    y: Float[Array, "B T W"],
    modulation: Float[Array, "B T 6W"],
    rate: float,
    dropout: Dropout | None,
    way: Way,
) -> Float[Array, "B T W"]:
    """x plus the gated output y of the MLP."""
    if way.fused:
        return _add_gated(x, y, modulation, *_places(rate, dropout, len(x)), way)
    return _plain_gate(x, jnp.split(modulation, 6, axis=-1)[GATE_MLP], drop(y, rate, dropout))


def _plain_gate(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """x + gate·y in float32, in the dtype of the residual stream."""
    return in_float32(lambda x, gate, y: x + gate * y, x.dtype)(x, gate, y)


def _places(rate: float, dropout: Dropout | None, rows: int) -> tuple[Int32[Array, "B 2"], float]:
    if dropout is None or not rate:
        return jnp.zeros((rows, 2), jnp.int32), 0.0
    return dropout.words, rate


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _norm(x, affine, modulation, way):
    return _norm_forward(x, affine, modulation, way)[0]


def _norm_forward(x, affine, modulation, way):
    arrays = x, modulation, modulation
    (y,) = _run(kernels.NORM_FORWARD, way, arrays, [modulation.dtype], affine=affine)
    return (y, x, modulation), (x, affine, modulation)


def _norm_backward(way, kept, gradients):
    (x, affine, modulation), (of_y, of_x, joined) = kept, gradients
    arrays = x, of_y, of_x, modulation
    of_x, joined, of_affine = _run(kernels.NORM_BACKWARD, way, arrays, [x.dtype], affine=affine, joined=joined)
    return of_x, of_affine, joined


_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _add_gated_norm(x, mixed, affine, modulation, words, rate, way):
    return _add_gated_norm_forward(x, mixed, affine, modulation, words, rate, way)[0]


def _add_gated_norm_forward(x, mixed, affine, modulation, words, rate, way):
    arrays, dtypes = (x, mixed, *(modulation,) * 3), [x.dtype, modulation.dtype]
    x, y = _run(kernels.GATED_NORM_FORWARD, way, arrays, dtypes, affine=affine, words=words, rate=rate)
    return (x, y, modulation), (x, mixed, affine, modulation, words)


def _add_gated_norm_backward(rate, way, kept, gradients):
    (x, mixed, affine, modulation, words), (of_x, of_y, joined) = kept, gradients
    arrays, dtypes = (x, mixed, of_y, of_x, modulation, modulation), [x.dtype, mixed.dtype]
    given = {"affine": affine, "words": words, "rate": rate, "joined": joined}
    of_x, of_mixed, joined, of_affine = _run(kernels.GATED_NORM_BACKWARD, way, arrays, dtypes, **given)
    return of_x, of_mixed, of_affine, joined, _of_words(words)


_add_gated_norm.defvjp(_add_gated_norm_forward, _add_gated_norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _add_gated(x, y, modulation, words, rate, way):
    return _add_gated_forward(x, y, modulation, words, rate, way)[0]


def _add_gated_forward(x, y, modulation, words, rate, way):
    gate = jnp.split(modulation, 6, axis=-1)[GATE_MLP]  # plain, so that XLA fuses it to the product that made y
    return _plain_gate(x, gate, drop(y, rate, Dropout(words))), (y, modulation, words)


def _add_gated_backward(rate, way, kept, of_x):
    y, modulation, words = kept
    arrays = of_x, y, modulation
    of_y, joined = _run(kernels.GATED_BACKWARD, way, arrays, [y.dtype], words=words, rate=rate)
    return of_x, of_y, joined, _of_words(words)


_add_gated.defvjp(_add_gated_forward, _add_gated_backward)


def _of_words(words: jax.Array) -> np.ndarray:
    """The gradient of integers."""
    return np.zeros(words.shape, jax.dtypes.float0)


def _run(
    kernel: kernels.Kernel,
    way: Way,
    arrays: tuple[jax.Array, ...],
    dtypes: list[jnp.dtype],
    *,
    affine: jax.Array | None = None,
    words: jax.Array | None = None,
    rate: float = 0.0,
    joined: jax.Array | None = None,
) -> list[jax.Array]:
    """Runs a kernel on all devices, each with rows of its own; arguments and results as of `kernels.call`."""

    def of_device(*given):
        return kernels.call(kernel, *given, dtypes, rate, fast_memory(), way.interpret)

    batch, mesh = len(arrays[0]), jax.sharding.get_abstract_mesh().shape
    words = jnp.zeros((batch, 2), jnp.int32) if words is None else words
    if math.prod(mesh.values()) > 1:
        rows = PartitionSpec(dividing(BATCH_AXES, batch, mesh))
        specs = rows, PartitionSpec(), rows, rows
        of_device = jax.shard_map(of_device, in_specs=specs, out_specs=rows, check_vma=False)
    results = of_device(arrays, affine, words, joined)
    return [*results[:-1], results[-1].sum((0, 2))] if kernel.has_sums else results
