"""The Pallas TPU kernels of `modulated.py`: element-wise work and sums over features, of a few positions at a time.

A grid step has the positions of one image, or as many of them as fit on the chip. It goes through them `TOGETHER` at a
time, so that all between reading and writing stays in registers. Arithmetic is float32.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from rear_jax.generators.dropout import kept
from rear_jax.generators.heads import LAYER_EPSILON

LANES, SUBLANES = 128, 8  # of a register of the vector unit
TOGETHER = 16  # positions: of bfloat16 they fill whole registers
SPARE = 2 * 2**20  # bytes of the fast memory that nothing is planned for

SHIFT_ATTENTION, SCALE_ATTENTION, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)  # parts of a modulation


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      length, width: T and W.
      block: positions of a grid step.
      rate: of dropout.
    """

    length: int
    width: int
    block: int
    rate: float

    def window(self, first: int, count: int = 1) -> pl.BlockSpec:
        """The part of an array [B, T, n W] that belongs to a grid step: `count` times W features from `first` W on."""
        block, width = self.block, self.width
        if first % count == 0:
            return pl.BlockSpec((1, block, count * width), lambda image, n, words: (image, n, first // count))
        sizes = (pl.Element(size) for size in (1, block, count * width))  # first is no multiple of the window
        place = 0 if block % TOGETHER else block  # of the second grid step; a block of other lengths is the only one
        return pl.BlockSpec(tuple(sizes), lambda image, n, words: (image, n * place, first * width))


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
      name: in profiles and plans.
      body: called with a `Step` and a reference to each array.
      reads: of each array that it reads, where the part begins that it needs, in W: 0 for arrays of W features.
      completes: first and number of the parts that it writes of the gradient of the modulation; none = (0, 0).
      has_sums: whether its last result is the gradient of a norm's affine part.
    """

    name: str
    body: Callable[..., None]
    reads: tuple[int, ...]
    completes: tuple[int, int] = (0, 0)
    has_sums: bool = False


def call(
    kernel: Kernel,
    arrays: Sequence[Float[Array, "B T _"]],
    affine: Float[Array, "2 W"] | None,
    words: Int32[Array, "B 2"],
    joined: Float[Array, "B T 6W"] | None,
    dtypes: Sequence[Any],
    rate: float,
    memory: int,
    interpret: bool,
) -> list[jax.Array]:
    """Runs a kernel on one device.

    Args:
      kernel: see there.
      arrays: that it reads. The first has W features; the last is the modulation.
      affine: of its norm, if it has one.
      words, rate: of dropout.
      joined: the gradient of the modulation, to be completed in place; None = a new one, of which nothing is written
        but what the kernel completes.
      dtypes: of the results [B, T, W].
      memory: bytes of the chip's fast memory.
      interpret: run the kernel's Python on any platform, slowly.

    Returns:
      these results; if the kernel completes it, the gradient of the modulation; if the kernel has sums, the gradient of
      `affine` for each image, in eight parts: [B, 2, 8, W].
    """
    batch, length, width = arrays[0].shape
    count = kernel.completes[1]
    outs = [jax.ShapeDtypeStruct((batch, length, width), dtype) for dtype in dtypes]
    outs += [jax.ShapeDtypeStruct((batch, length, 6 * width), arrays[-1].dtype)] if count else []
    sizes = [one.dtype.itemsize for one in (*arrays, *outs[: len(dtypes)], *outs[len(dtypes) :] * count)]
    block, needed = _block(length, width * sum(sizes), memory)
    shape = Shape(length, width, block, rate)
    inputs = [(array, shape.window(start)) for array, start in zip(arrays, kernel.reads, strict=True)]
    if affine is not None:
        inputs.append((affine, pl.BlockSpec(affine.shape, lambda image, n, words: (0, 0))))
    if joined is not None:
        inputs.append((joined, pl.BlockSpec(memory_space=pl.ANY)))
    windows = [shape.window(0)] * len(dtypes) + ([shape.window(*kernel.completes)] if count else [])
    if kernel.has_sums:
        outs.append(jax.ShapeDtypeStruct((batch, 2, SUBLANES, width), jnp.float32))
        windows.append(pl.BlockSpec((1, 2, SUBLANES, width), lambda image, n, words: (image, 0, 0, 0)))
    rows = batch * length
    return pl.pallas_call(
        functools.partial(_run, kernel, shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, -(-length // block)),
            in_specs=[window for _, window in inputs],
            out_specs=windows,
        ),
        out_shape=outs,
        input_output_aliases={} if joined is None else {len(inputs): len(dtypes)},  # the words are input 0
        interpret=interpret,
        name=kernel.name,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=rows, bytes_accessed=rows * width * sum(sizes)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=needed),
    )(words.reshape(-1) if rate else jnp.zeros(1, jnp.int32), *(array for array, _ in inputs))


def _run(kernel: Kernel, shape: Shape, words: Any, *refs: Any) -> None:
    place = 2 * pl.program_id(0)
    of_image = (words[place], words[place + 1]) if shape.rate else None
    kernel.body(Step(shape, of_image, pl.program_id(1) * shape.block), *refs)


def _block(length: int, position: int, memory: int) -> tuple[int, int]:
    """Positions of a grid step, and bytes for two of its windows: all, or as few blocks of whole registers as fit.

    `position` is the bytes of one position.
    """
    for count in range(1, length + 1):
        block = -(-length // (count * TOGETHER)) * TOGETHER
        needed = 2 * position * block + SPARE
        if needed <= memory or block == TOGETHER:
            break
    return min(block, length), needed


def standardised(x: Float[Array, "... W"]) -> tuple[Float[Array, "... W"], Float[Array, "... 1"]]:
    """x with mean 0 and variance 1, and what its deviations were multiplied by for that."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + LAYER_EPSILON)
    return centred * spread, spread


class Rows(NamedTuple):
    """Positions of a window that are computed together.

    Attributes:
      at: their place in the window.
      numbers: of the positions in their sequence, [rows, 1].
    """

    at: Any
    numbers: jax.Array

    def read(self, ref: Any) -> Float[Array, "rows W"]:
        """Those of an array."""
        return ref[0, self.at].astype(jnp.float32)

    def write(self, ref: Any, x: Float[Array, "rows W"], columns: slice = slice(None)) -> None:
        """Puts them into an array."""
        ref[0, self.at, columns] = x.astype(ref.dtype)


class Step(NamedTuple):
    """A step of the grid.

    Attributes:
      shape: see there.
      words: of dropout, of this image, if there is any.
      first: the first position of the window.
    """

    shape: Shape
    words: tuple[jax.Array, jax.Array] | None
    first: jax.Array

    def each(self, run: Callable[[Rows], None]) -> None:
        """Calls `run` with all rows of the window, some at a time."""
        whole, rest = divmod(self.shape.block, TOGETHER)

        def some(start, count):
            number = self.first + start + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
            run(Rows(pl.ds(start, count), number))

        def loop(n, _):
            some(pl.multiple_of(n * TOGETHER, TOGETHER), TOGETHER)

        if whole:
            lax.fori_loop(0, whole, loop, None)
        if rest:
            some(whole * TOGETHER, rest)

    def dropout(self, rows: Rows) -> Callable[[Float[Array, "rows W"]], Float[Array, "rows W"]]:
        """`dropout.drop` of these rows."""
        shape = self.shape
        if not shape.rate:
            return lambda x: x
        column = lax.broadcasted_iota(jnp.int32, (rows.at.size, shape.width), 1)
        survivors = kept(rows.numbers * shape.width + column, *self.words, shape.rate)
        return lambda x: jnp.where(survivors, x * (1.0 / (1.0 - shape.rate)), 0.0)

    def add(self, of_affine: Any, rows: Rows, parts: tuple[Float[Array, "rows W"], ...]) -> None:
        """Adds rows to sums [1, 2, 8, W], without those behind the end of the sequence."""
        shape = self.shape
        for n, x in enumerate(parts):
            x = jnp.where(rows.numbers < shape.length, x, 0.0) if shape.length % shape.block else x
            if rows.at.size % SUBLANES:
                of_affine[0, n, :1] += jnp.sum(x, axis=0, keepdims=True)
            else:
                of_affine[0, n] += jnp.sum(x.reshape(-1, SUBLANES, shape.width), axis=0)


def _begin(of_affine: Any) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _():
        of_affine[...] = jnp.zeros(of_affine.shape, of_affine.dtype)


def _normed(x: jax.Array, shift: jax.Array, scale: jax.Array, affine: Any) -> jax.Array:
    unit, _ = standardised(x)
    return (unit * affine[0:1] + affine[1:2]) * (1.0 + scale) + shift


def _through_norm(
    x: jax.Array, of_y: jax.Array, scale: jax.Array, affine: Any
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """From the gradient of a norm's modulated result: those of x, of the scale, and of its affine part row by row."""
    gain, bias = affine[0:1], affine[1:2]
    unit, spread = standardised(x)
    of_scale = of_y * (unit * gain + bias)
    of_normed = of_y * (1.0 + scale)
    of_unit = of_normed * gain
    across = jnp.mean(of_unit * unit, axis=-1, keepdims=True)
    of_x = spread * (of_unit - jnp.mean(of_unit, axis=-1, keepdims=True) - unit * across)
    return of_x, of_scale, (of_normed * unit, of_normed)


def _norm_forward(step, x, shift, scale, affine, y):
    def run(rows):
        rows.write(y, _normed(rows.read(x), rows.read(shift), rows.read(scale), affine))

    step.each(run)


def _norm_backward(step, x, of_y, of_x, scale, affine, _, out, parts, of_affine):
    _begin(of_affine)
    width = step.shape.width

    def run(rows):
        gradient = rows.read(of_y)
        through, of_scale, of_rows = _through_norm(rows.read(x), gradient, rows.read(scale), affine)
        rows.write(out, rows.read(of_x) + through)
        rows.write(parts, gradient, slice(width))
        rows.write(parts, of_scale, slice(width, 2 * width))
        step.add(of_affine, rows, of_rows)

    step.each(run)


def _gated_norm_forward(step, x, mixed, gate, shift, scale, affine, out, y):
    def run(rows):
        total = rows.read(x) + rows.read(gate) * step.dropout(rows)(rows.read(mixed))
        rows.write(out, total)
        rows.write(y, _normed(total, rows.read(shift), rows.read(scale), affine))

    step.each(run)


def _gated_norm_backward(step, x, mixed, of_y, of_x, gate, scale, affine, _, out, of_mixed, parts, of_affine):
    _begin(of_affine)
    width = step.shape.width

    def run(rows):
        gradient = rows.read(of_y)
        through, of_scale, of_rows = _through_norm(rows.read(x), gradient, rows.read(scale), affine)
        total, drop = rows.read(of_x) + through, step.dropout(rows)
        rows.write(out, total)
        rows.write(of_mixed, drop(total * rows.read(gate)))
        for n, one in enumerate((total * drop(rows.read(mixed)), gradient, of_scale)):
            rows.write(parts, one, slice(n * width, (n + 1) * width))
        step.add(of_affine, rows, of_rows)

    step.each(run)


def _gated_backward(step, of_x, y, gate, of_y, parts):
    def run(rows):
        gradient, drop = rows.read(of_x), step.dropout(rows)
        rows.write(of_y, drop(gradient * rows.read(gate)))
        rows.write(parts, gradient * drop(rows.read(y)))

    step.each(run)


NORM_FORWARD = Kernel("modulated_norm_forward", _norm_forward, (0, SHIFT_ATTENTION, SCALE_ATTENTION))
NORM_BACKWARD = Kernel(
    "modulated_norm_backward", _norm_backward, (0, 0, 0, SCALE_ATTENTION), (SHIFT_ATTENTION, 2), has_sums=True
)
GATED_NORM_FORWARD = Kernel("gated_norm_forward", _gated_norm_forward, (0, 0, GATE_ATTENTION, SHIFT_MLP, SCALE_MLP))
GATED_NORM_BACKWARD = Kernel(
    "gated_norm_backward",
    _gated_norm_backward,
    (0, 0, 0, 0, GATE_ATTENTION, SCALE_MLP),
    (GATE_ATTENTION, 3),
    has_sums=True,
)
GATED_BACKWARD = Kernel("gated_backward", _gated_backward, (0, 0, GATE_MLP), (GATE_MLP, 1))
