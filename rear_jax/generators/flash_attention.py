"""Causal attention on GPUs, dropout of attention weights included, as Pallas kernels for Triton.

This is flash attention (Dao, https://arxiv.org/abs/2307.08691). A program takes some queries of a head, goes through
the keys that they see block by block, and keeps a running softmax. So nothing of [T, T] ever goes to main memory. Two
kernels go back: one takes queries and goes through keys, the other takes keys and goes through queries. Both compute
the weights again from the logarithm of each query's sum of exponentials. No result is added up by several programs, so
results are the same in every run.

cuDNN's kernel has a seed of dropout, but as a constant of the program. The mask here is the hash of `dropout.py`, bit
for bit that of the plain form.

Triton computes on blocks whose sizes are powers of two. The arrays in memory keep their own sizes: positions after the
last and features that a head does not have are masked where they are read and written.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int32

from rear_jax.generators.dropout import ROW, kept

HIDDEN = -1e30  # score of a key that a query does not see
LOG2_E = math.log2(math.e)
LEAST = 16  # positions or features of a block that tensor cores multiply


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Attributes:
      own: positions that a program is for.
      other: positions that it takes at a time on its way through the others.
      warps: of a program.
      stages: of the loop, the first of which read ahead.
    """

    own: int
    other: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      length, size: T and D.
      rate: of dropout.
      precision: of products of float32.
    """

    length: int
    size: int
    rate: float = 0.0
    precision: Any = None

    @property
    def features(self) -> int:
        """Of a block."""
        return max(pl.next_power_of_2(self.size), LEAST)

    @property
    def factor(self) -> float:
        """From products to scores, of which softmax is with base 2."""
        return self.size**-0.5 * LOG2_E

    def blocks(self, itemsize: int) -> Blocks:
        """For elements of so many bytes: what spills few registers, and fits into the 99 KiB of a small GPU's core."""
        least = max(pl.next_power_of_2(self.length), LEAST)
        own, stages = (64, 3) if itemsize == 2 else (32, 2)
        return Blocks(min(own, least), min(32, least), warps=4, stages=stages)


def flash_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T H D"],
    values: Float[Array, "B T H D"],
    *,
    visible: Bool[Array, "B T"] | None = None,
    rate: float = 0.0,
    words: Int32[Array, "B H 2"] | None = None,
    precision: Any = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Causal softmax attention on one device; softmax in float32.

    Args:
      queries, keys, values: one dtype.
      visible: positions that others may see; each sees itself in any case. None = all.
      rate, words: of dropout of attention weights; the words of `Dropout.of_heads`.
      precision: of products of float32.
      interpret: run the kernels' Python on any platform, slowly.
    """
    rate = 0.0 if words is None else rate
    shape = Shape(queries.shape[1], queries.shape[3], rate, precision if queries.dtype == jnp.float32 else None)
    given = None if visible is None else visible.astype(jnp.int32), words if rate else None
    return _attention(queries, keys, values, *given, shape, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(queries, keys, values, visible, words, shape, interpret):
    return _forward(queries, keys, values, visible, words, shape, interpret)[0]


def _forward(queries, keys, values, visible, words, shape, interpret):
    given = queries, keys, values, visible, words
    outs = [queries, _of_queries(queries)]
    out, sums = _call(flash_forward, shape, given, outs, interpret)
    return out, (*given, out, sums)


def _backward(shape, interpret, kept_for_it, gradient):
    *given, out, sums = kept_for_it
    queries, keys, values, visible, words = given
    wide = (x.astype(jnp.float32) for x in (gradient, out))
    means = jnp.einsum("bthd,bthd->bht", *wide, precision=lax.Precision.HIGHEST)  # of the weights' gradients
    given = *given, gradient, sums, means
    (of_queries,) = _call(flash_backward_queries, shape, given, [queries], interpret)
    of_keys, of_values = _call(flash_backward_keys, shape, given, [keys, values], interpret)
    nothing = (None if x is None else np.zeros(x.shape, jax.dtypes.float0) for x in (visible, words))
    return of_queries, of_keys, of_values, *nothing


_attention.defvjp(_forward, _backward)


def _of_queries(queries: Float[Array, "B T H D"]) -> jax.ShapeDtypeStruct:
    """One number for each query of each head."""
    batch, length, heads, _ = queries.shape
    return jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)


def _call(
    kernel: Callable[..., None], shape: Shape, given: Sequence[jax.Array | None], outs: Sequence[Any], interpret: bool
) -> list[jax.Array]:
    """Runs a kernel: a program for some positions of a head of an image, which sees that head whole."""
    batch, length, heads, size = given[0].shape
    blocks = shape.blocks(given[0].dtype.itemsize)
    filled = -(-length // blocks.own) * blocks.own  # nothing is copied for it: what is behind the end is masked
    windows = {
        "heads": pl.BlockSpec((None, filled, None, shape.features), lambda i, h, b: (b, 0, h, 0)),
        "queries": pl.BlockSpec((None, None, filled), lambda i, h, b: (b, h, 0)),
        "visible": pl.BlockSpec((None, filled), lambda i, h, b: (b, 0)),
        "words": pl.BlockSpec((None, None, 2), lambda i, h, b: (b, h, 0)),
    }
    kinds = ("heads",) * 3 + ("visible", "words", "heads", "queries", "queries")
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*given, *outs) if x is not None)
    scores = batch * heads * length * (length + 1) // 2
    return pl.pallas_call(
        functools.partial(kernel, shape=shape, blocks=blocks),
        grid=(-(-length // blocks.own), heads, batch),
        in_specs=[None if x is None else windows[kind] for x, kind in zip(given, kinds, strict=False)],
        out_specs=[windows["heads" if out.ndim == 4 else "queries"] for out in outs],
        out_shape=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs],
        interpret=interpret,
        name=kernel.__name__,
        cost_estimate=pl.CostEstimate(
            flops=2 * PRODUCTS[kernel] * size * scores, transcendentals=scores, bytes_accessed=moved
        ),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
    )(*given)


class Pairs(NamedTuple):
    """Which scores a block holds, and what becomes of them.

    Attributes:
      query, key: their positions, [queries, 1] and [1, keys], or the other way round.
      visible: of the keys, or None.
      words: two numbers, or None.
      shape: see there.
    """

    query: jax.Array
    key: jax.Array
    visible: jax.Array | None
    words: tuple[jax.Array, jax.Array] | None
    shape: Shape

    def seen(self, products: jax.Array) -> jax.Array:
        """Scores: products scaled, but HIDDEN where a query does not see a key."""
        seen = self.key <= self.query  # so no query sees what is behind the last position
        if self.visible is not None:
            seen = seen & (self.visible > 0) | (self.key == self.query)
        return jnp.where(seen, products * self.shape.factor, HIDDEN)

    def dropped(self, weights: jax.Array) -> jax.Array:
        """Zero where dropout drops; the rest is not scaled."""
        if self.words is None:
            return weights
        return jnp.where(kept(self.query * ROW + self.key, *self.words, self.shape.rate), weights, 0.0)


class Head(NamedTuple):
    """What a program reads of its head.

    Attributes:
      shape: see there.
      visible: reference to [T], or None.
      words: reference to [2], or None.
    """

    shape: Shape
    visible: Any
    words: Any

    def features(self, ref: Any, start: Any, count: int) -> jax.Array:
        """Some positions of [T, D], zero where there is nothing."""
        return plgpu.load(ref.at[pl.ds(start, count), :], mask=self._inside(start, count), other=0.0)

    def write(self, ref: Any, start: Any, block: jax.Array) -> None:
        """The reverse."""
        mask = self._inside(start, block.shape[0])
        plgpu.store(ref.at[pl.ds(start, block.shape[0]), :], block.astype(ref.dtype), mask=mask)

    def numbers(self, ref: Any, start: Any, count: int) -> jax.Array:
        """Some positions of [T]."""
        there = start + jnp.arange(count) < self.shape.length
        return plgpu.load(ref.at[pl.ds(start, count)], mask=there, other=0)

    def pairs(self, query: Any, queries: int, key: Any, keys: int, *, axis: int) -> Pairs:
        """Of so many queries and keys from these on; the keys lie along `axis`."""
        ranges = query + jnp.arange(queries), key + jnp.arange(keys)
        visible = None if self.visible is None else jnp.expand_dims(self.numbers(self.visible, key, keys), 1 - axis)
        words = None if self.words is None else (self.words[0], self.words[1])
        places = jnp.expand_dims(ranges[0], axis), jnp.expand_dims(ranges[1], 1 - axis)
        return Pairs(*places, visible, words, self.shape)

    def dot(self, a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
        """The product over one axis of each, in float32."""
        dims = (((axes[0],), (axes[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=self.shape.precision, preferred_element_type=jnp.float32)

    def _inside(self, start: Any, count: int) -> jax.Array:
        rows, columns = start + jnp.arange(count), jnp.arange(self.shape.features)
        return (rows < self.shape.length)[:, None] & (columns < self.shape.size)[None]


def flash_forward(q_ref, k_ref, v_ref, visible, words, out_ref, sums_ref, *, shape: Shape, blocks: Blocks) -> None:
    """Outputs [T, D] of the program's queries, and log2 of their sums of exponentials, [T]."""
    head, (own, other, *_) = Head(shape, visible, words), blocks
    start = _latest_first() * own
    q = head.features(q_ref, start, own)

    def take(n, so_far):
        out, largest, total = so_far
        k, v = (head.features(ref, n * other, other) for ref in (k_ref, v_ref))
        pairs = head.pairs(start, own, n * other, other, axis=1)
        scores = pairs.seen(head.dot(q, k, (1, 1)))
        new = jnp.maximum(largest, jnp.max(scores, axis=1))
        e, fade = jnp.exp2(scores - new[:, None]), jnp.exp2(largest - new)
        mixed = head.dot(pairs.dropped(e).astype(v.dtype), v, (1, 0))
        return out * fade[:, None] + mixed, new, total * fade + jnp.sum(e, axis=1)

    nothing = jnp.zeros((own, shape.features)), jnp.full((own,), HIDDEN), jnp.zeros((own,))
    out, largest, total = lax.fori_loop(0, _end(start, blocks, shape), take, nothing)
    head.write(out_ref, start, out / (total * (1.0 - shape.rate))[:, None])
    inside = start + jnp.arange(own) < shape.length
    plgpu.store(sums_ref.at[pl.ds(start, own)], largest + jnp.log2(total), mask=inside)


def flash_backward_queries(
    q_ref, k_ref, v_ref, visible, words, gradient, sums, means, of_q, *, shape: Shape, blocks: Blocks
) -> None:
    """Gradients [T, D] of the program's queries."""
    head, (own, other, *_) = Head(shape, visible, words), blocks
    start = _latest_first() * own
    q, of_out = (head.features(ref, start, own) for ref in (q_ref, gradient))
    sums, means = (head.numbers(ref, start, own)[:, None] for ref in (sums, means))

    def take(n, so_far):
        k, v = (head.features(ref, n * other, other) for ref in (k_ref, v_ref))
        pairs = head.pairs(start, own, n * other, other, axis=1)
        weights = jnp.exp2(pairs.seen(head.dot(q, k, (1, 1))) - sums)
        of_weights = pairs.dropped(head.dot(of_out, v, (1, 1)) * (1.0 / (1.0 - shape.rate)))
        of_scores = weights * (of_weights - means)
        return so_far + head.dot(of_scores.astype(k.dtype), k, (1, 0))

    of = lax.fori_loop(0, _end(start, blocks, shape), take, jnp.zeros((own, shape.features)))
    head.write(of_q, start, of * shape.size**-0.5)


def flash_backward_keys(
    q_ref, k_ref, v_ref, visible, words, gradient, sums, means, of_k, of_v, *, shape: Shape, blocks: Blocks
) -> None:
    """Gradients [T, D] of the program's keys and values; scores are [keys, queries]."""
    head, (own, other, *_) = Head(shape, visible, words), blocks
    start = pl.program_id(0) * own
    k, v = (head.features(ref, start, own) for ref in (k_ref, v_ref))

    def take(n, so_far):
        q, of_out = (head.features(ref, n * other, other) for ref in (q_ref, gradient))
        sum_of, mean_of = (head.numbers(ref, n * other, other)[None] for ref in (sums, means))
        pairs = head.pairs(n * other, other, start, own, axis=0)
        weights = jnp.exp2(pairs.seen(head.dot(k, q, (1, 1))) - sum_of)
        of_weights = pairs.dropped(head.dot(v, of_out, (1, 1)) * (1.0 / (1.0 - shape.rate)))
        of_scores = weights * (of_weights - mean_of)
        mixed = head.dot(pairs.dropped(weights).astype(of_out.dtype), of_out, (1, 0))
        return so_far[0] + head.dot(of_scores.astype(q.dtype), q, (1, 0)), so_far[1] + mixed

    nothing = jnp.zeros((own, shape.features)), jnp.zeros((own, shape.features))
    first, end = lax.div(start, other), -(-shape.length // other)
    of_keys, of_values = lax.fori_loop(first, end, take, nothing)
    head.write(of_k, start, of_keys * shape.size**-0.5)
    head.write(of_v, start, of_values * (1.0 / (1.0 - shape.rate)))


PRODUCTS = {flash_forward: 2, flash_backward_queries: 3, flash_backward_keys: 4}  # of a score


def _latest_first() -> jax.Array:
    """Number of the program's block: those that see most begin first."""
    return pl.num_programs(0) - 1 - pl.program_id(0)


def _end(start: jax.Array, blocks: Blocks, shape: Shape) -> jax.Array:
    """Of the blocks of keys that one of a program's queries sees."""
    return lax.div(jnp.minimum(start + blocks.own, shape.length) + blocks.other - 1, blocks.other)
