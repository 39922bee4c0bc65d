"""The Pallas TPU kernels of `fused_attention.py`: what is computed for one image, forward and backward.

Positions lie on the 128 lanes of the vector unit. A head is [D, T], its scores are [keys, queries]. So a statistic of a
query is a row [1, queries], which costs little, and a sum over keys is one over whole registers. Queries are taken
`QUERIES` at a time, with those keys alone that one of them sees. Where they are few, as the last two of 258, scores are
[queries, keys], so that lanes are not left empty. The exponential is of base 2: its factor is in the queries.

The compiler keeps nearly to the order of what is written, and a product has to be waited for. So several heads are
computed side by side: a head is a generator, which yields where it would have to wait, and `Image.heads` goes from one
to the next there.
"""

import itertools
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from rear_jax.generators.dropout import ROW, kept
from rear_jax.generators.heads import LAYER_EPSILON, RMS_EPSILON

LANES, SUBLANES = 128, 8  # of a register of the vector unit
QUERIES = 128  # of one part
TOGETHER, REGISTERS = 8, 512  # heads side by side at most, and registers of their scores
SPARE = 2 * 2**20  # bytes of the fast memory that nothing is planned for
HIDDEN = -1e30  # score of a key that a query does not see
LOG2_E = math.log2(math.e)

Head = Callable[[Any, Any], Generator]  # (number in the image, number in the group) -> its stages


class Part(NamedTuple):
    """Scores that are computed at once: of some queries, with the keys that one of them sees.

    Attributes:
      start, end: of the queries.
      keys: end of the keys.
    """

    start: int
    end: int
    keys: int

    @property
    def axis(self) -> int:
        """Of the keys: 0 where scores are [keys, queries], 1 where they are [queries, keys]."""
        rows = -(-(self.end - self.start) // SUBLANES)
        return int(rows * (-(-self.keys // LANES) + 2) < self.keys // SUBLANES)

    @property
    def registers(self) -> int:
        """How many the scores fill."""
        rows, columns = (self.keys, self.end - self.start)[:: 1 - 2 * self.axis]
        return -(-rows // SUBLANES) * -(-columns // LANES)

    def places(self, first: int = 0) -> tuple[jax.Array, jax.Array]:
        """The query and the key of each score, from the key `first` on."""
        sizes = (self.keys - first, self.end - self.start)[:: 1 - 2 * self.axis]
        key, query = (lax.broadcasted_iota(jnp.int32, sizes, axis) for axis in (self.axis, 1 - self.axis))
        return query + self.start, key + first


class Shape(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      heads, size, length: H, D and T of one image on one device.
      rate: of dropout.
      blocks: lengths of the parts of a sequence that see themselves and those before them; () = single positions.
      precision: of products of float32.
      itemsize: bytes of a feature.
      memory: bytes of the chip's fast memory.
      distance: from the first feature of a rotated pair to the second.
    """

    heads: int
    size: int
    length: int
    rate: float = 0.0
    blocks: tuple[int, ...] = ()
    precision: Any = None
    itemsize: int = 2
    memory: int = 16 * 2**20
    distance: int = 1

    @property
    def width(self) -> int:
        """Features of all heads."""
        return self.heads * self.size

    @property
    def group(self) -> int:
        """Heads that are read at once: up to `TOGETHER`, but as many as fill whole registers side by side."""
        least = LANES // math.gcd(LANES, self.size)
        counts = [count for count in range(1, self.heads + 1) if self.heads % count == 0 and count % least == 0]
        good = [count for count in counts if count <= TOGETHER and self.needs(count) <= self.memory]
        return max(good, default=min(counts, default=self.heads))

    @property
    def needed(self) -> int:
        """Bytes of the chip's fast memory that the backward kernel takes, for its image and the next."""
        return self.needs(self.group)

    def needs(self, group: int) -> int:
        """The same, where so many heads are read at once."""
        windows = 7 * self.width * -(-self.length // 16) * 16 * self.itemsize  # qkv, and the gradients of it and of out
        head = self.size * -(-self.length // LANES) * LANES * 4  # [D, T]
        pads, between = 7 * group * head, 7 * self.beside(group) * head
        return 2 * windows + pads + between + SPARE

    @property
    def together(self) -> int:
        """Heads of a group that are computed side by side."""
        return self.beside(self.group)

    def beside(self, group: int) -> int:
        """The same of a group of so many heads."""
        registers = sum(part.registers for part in self.parts())
        counts = [count for count in range(1, group + 1) if group % count == 0]
        return max(count for count in counts if count == 1 or (count <= TOGETHER and count * registers <= REGISTERS))

    def parts(self) -> list[Part]:
        """All scores of a head."""
        starts = range(0, self.length, QUERIES)
        ends = [min(start + QUERIES, self.length) for start in starts]
        return [Part(start, end, self._keys(end)) for start, end in zip(starts, ends, strict=True)]

    def _keys(self, end: int) -> int:
        seen = next((int(last) for last in np.cumsum(self.blocks) if last >= end), end)
        return min(-(-seen // LANES) * LANES, self.length)


class Image(NamedTuple):
    """What a kernel has of the image that it works on.

    Attributes:
      shape: see there.
      given: the references to the arrays of `fused_attention.Inputs` that there are, by name.
      words: of dropout, of all images.
      number: of the image.
    """

    shape: Shape
    given: Mapping[str, Any]
    words: Any
    number: jax.Array

    def groups(self, heads_read: Any, head: Head, write: Callable[[Any], None]) -> None:
        """Goes through all groups of heads: reads them, computes them, and calls `write` with their first feature."""
        shape = self.shape

        def several(first, n):
            numbers = [n * shape.together + m for m in range(shape.together)]
            for _ in itertools.zip_longest(*(head(first + m, m) for m in numbers)):
                pass

        def group(n):
            first = n * shape.group
            self._read(heads_read, first * shape.size)
            _loop(shape.group // shape.together, lambda n: several(first, n))
            write(first * shape.size)

        _loop(shape.heads // shape.group, group)

    def _read(self, heads_read: Any, start: Any) -> None:
        """Queries, keys, values and, going back, the gradient of the output of a group: each [group, D, T] float32."""
        shape = self.shape
        places = [("qkv", n * shape.width) for n in range(3)] + [("gradient", 0)]
        for n, (name, column) in enumerate(places[: heads_read.shape[0]]):
            x = self.given[name][0, :, self._columns(column + start)]
            heads_read[n] = x.astype(jnp.float32).T.reshape(shape.group, shape.size, shape.length)

    def write(self, out: Any, heads_made: Float[Array, "group D T"], start: Any) -> None:
        """Puts a group into its columns of [1, T, W]."""
        out[0, :, self._columns(start)] = heads_made.reshape(-1, self.shape.length).T.astype(out.dtype)

    def _columns(self, start: Any) -> Any:
        features = self.shape.group * self.shape.size
        return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, math.gcd(features, LANES)), features)

    def prepared(self, x: Float[Array, "D T"], n: int) -> tuple[Float[Array, "D T"], Any]:
        """Queries (n = 0) or keys (n = 1) of a head, normalised and rotated; and what going back needs."""
        back = None
        if "norms" in self.given:
            norms = self.given["norms"][...]
            centred = norms.shape[1] == 4
            x = x - jnp.mean(x, 0, keepdims=True) if centred else x
            spread = lax.rsqrt(jnp.mean(x * x, 0, keepdims=True) + (LAYER_EPSILON if centred else RMS_EPSILON))
            back = x * spread, spread
            x = back[0] * norms[:, n : n + 1]
            x = x + norms[:, n + 2 : n + 3] if centred else x
        if "turns" in self.given:
            x = x * self.given["turns"][0, 0] + self._swapped(x) * self.given["turns"][1, 0]
        return x, back

    def unprepared(self, gradient: Float[Array, "D T"], back: Any, n: int) -> tuple[Float[Array, "D T"], tuple]:
        """The gradient of what `prepared` was given from that of its result, and those of the norm, [D, 1] each."""
        if "turns" in self.given:
            gradient = gradient * self.given["turns"][0, 0] + self._swapped(gradient * self.given["turns"][1, 0])
        if back is None:
            return gradient, ()
        (unit, spread), norms = back, self.given["norms"][...]
        centred = norms.shape[1] == 4
        of_norm = (jnp.sum(gradient * unit, 1, keepdims=True),)
        of_norm += (jnp.sum(gradient, 1, keepdims=True),) if centred else ()
        gradient = gradient * norms[:, n : n + 1]
        gradient = (
            gradient
            - unit * jnp.mean(gradient * unit, 0, keepdims=True)
            - (jnp.mean(gradient, 0, keepdims=True) if centred else 0.0)
        )
        return gradient * spread, of_norm

    def _swapped(self, x: Float[Array, "D T"]) -> Float[Array, "D T"]:
        """The features of each rotated pair exchanged."""
        size, distance = self.shape.size, self.shape.distance
        after = pltpu.roll(x, distance, 0)
        if 2 * distance == size:
            return after
        first = lax.broadcasted_iota(jnp.int32, x.shape, 0) % (2 * distance) < distance
        return jnp.where(first, pltpu.roll(x, size - distance, 0), after)

    def scores(self, of_keys: jax.Array, of_queries: jax.Array, part: Part) -> jax.Array:
        """Products of the vectors of all keys, [D, keys], with those of the queries, [D, queries]."""
        both = (of_queries, of_keys) if part.axis else (of_keys, of_queries)
        return self.dot(*both, (0, 0))

    def dot(self, a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
        """The product over one axis of each, in float32."""
        dims = (((axes[0],), (axes[1],)), ((), ()))
        return lax.dot_general(a, b, dims, precision=self.shape.precision, preferred_element_type=jnp.float32)

    def exponentials(self, scores: jax.Array, part: Part) -> tuple[jax.Array, jax.Array | float]:
        """2^(score - largest of the query), and what scales them to softmax: [1, queries], or 1 where that is done."""
        scores = self._seen(scores, part)
        e = jnp.exp2(scores - jnp.max(scores, part.axis, keepdims=True))
        inverse = 1.0 / jnp.sum(e, part.axis, keepdims=True)
        return (e * inverse, 1.0) if part.axis else (e, inverse)

    def _seen(self, scores: jax.Array, part: Part) -> jax.Array:
        """The same, but HIDDEN where a query does not see a key."""
        first = 0 if "visible" in self.given else part.start  # the keys before are seen by all queries of the part
        query, key = part.places(first)
        seen = key < self._ends(query) if self.shape.blocks else key <= query
        if "visible" in self.given:
            visible = self.given["visible"][0, :, : part.keys]  # [1, keys]
            if part.axis == 0:
                visible = jnp.broadcast_to(visible, (SUBLANES, part.keys)).T[:, :1]
            seen = seen & (visible > 0) | (key == query)
        if not first:
            return jnp.where(seen, scores, HIDDEN)
        before, rest = jnp.split(scores, [first], part.axis)
        return jnp.concatenate([before, jnp.where(seen, rest, HIDDEN)], part.axis)

    def _ends(self, query: jax.Array) -> jax.Array:
        """The end of the block that a query is in."""
        starts = np.cumsum((0, *self.shape.blocks)).tolist()
        return sum(
            jnp.where(query >= start, length, 0) for start, length in zip(starts, self.shape.blocks, strict=False)
        )

    def survivors(self, number: Any, part: Part) -> Bool[Array, "..."]:
        """Which attention weights of a head dropout keeps."""
        query, key = part.places()
        place = 2 * (self.number * self.shape.heads + number)
        return kept(query * ROW + key, self.words[place], self.words[place + 1], self.shape.rate)


def forward(shape: Shape, names: tuple[str, ...], words: Any, *refs: Any) -> None:
    """The kernel of the output [1, T, W].

    Args:
      shape: see there.
      names: of the arrays that are given.
      words: of dropout.
      *refs: to these arrays, to the output, and to two pads: [3, group, D, T] for what is read, [1, group, D, T].
    """
    (out, read, made), dtype = refs[len(names) :], refs[len(names)].dtype
    image = Image(shape, dict(zip(names, refs, strict=False)), words, pl.program_id(0))

    def head(number, i):
        q, k, v = (x.astype(dtype) for x in _ready(image, read, i)[0])
        for part in shape.parts():
            scores = image.scores(k[:, : part.keys], q[:, part.start : part.end], part)
            yield
            e, scale = image.exponentials(scores, part)
            e = jnp.where(image.survivors(number, part), e, 0.0) if shape.rate else e
            yield
            mixed = image.dot(v[:, : part.keys], e.astype(dtype), (1, part.axis))  # [D, queries]
            made[0, i, :, part.start : part.end] = mixed * (scale * (1.0 / (1.0 - shape.rate)))

    image.groups(read, head, lambda start: image.write(out, made[0], start))


def backward(shape: Shape, names: tuple[str, ...], words: Any, *refs: Any) -> None:
    """The kernel of the gradients of the projection, [1, T, 3 W], and of the norms, [1, D, 128], if there are any.

    Arguments as of `forward`; the pads are [4, group, D, T] for what is read, and [3, group, D, T].
    """
    (of_qkv, *of_norms, read, made), dtype = refs[len(names) :], refs[len(names)].dtype
    image = Image(shape, dict(zip(names, refs, strict=False)), words, pl.program_id(0))
    for out in of_norms:
        out[...] = jnp.zeros(out.shape, out.dtype)

    def head(number, i):
        ready, back = _ready(image, read, i)
        q, k, v = (x.astype(dtype) for x in ready)
        for part in reversed(shape.parts()):  # the last one sees all keys
            queries, keys = slice(part.start, part.end), slice(part.keys)
            scores = image.scores(k[:, keys], q[:, queries], part)
            yield
            e, scale = image.exponentials(scores, part)
            gradient = (read[3, i, :, queries] * (scale * (1.0 / (1.0 - shape.rate)))).astype(dtype)  # [D, queries]
            yield
            of_e = image.scores(v[:, keys], gradient, part)
            yield
            weights = e
            if shape.rate:
                survivors = image.survivors(number, part)
                of_e, weights = (jnp.where(survivors, x, 0.0) for x in (of_e, e))
            of_scores = e * (of_e - scale * jnp.sum(e * of_e, part.axis, keepdims=True))
            of_scores, weights = of_scores.astype(dtype), weights.astype(dtype)
            yield
            made[0, i, :, queries] = image.dot(k[:, keys], of_scores, (1, part.axis))
            of_k = image.dot(q[:, queries], of_scores, (1, 1 - part.axis))  # [D, keys]
            of_v = image.dot(gradient, weights, (1, 1 - part.axis))
            for n, of in ((1, of_k), (2, of_v)):
                made[n, i, :, keys] = of if part.end == shape.length else made[n, i, :, keys] + of
        yield
        columns = []
        for n, factor in enumerate((shape.size**-0.5, 1.0 / LOG2_E)):
            made[n, i], of_norm = image.unprepared(made[n, i] * factor, back[n], n)
            columns.append(of_norm)
        lane = lax.broadcasted_iota(jnp.int32, (shape.size, LANES), 1)
        for n, column in enumerate(itertools.chain(*zip(*columns, strict=True))):  # in the order of the norms
            of_norms[0][0] += jnp.where(lane == n, column, 0.0)

    def write(start):
        for n in range(3):
            image.write(of_qkv, made[n], n * shape.width + start)

    image.groups(read, head, write)


def _ready(image: Image, read: Any, i: Any) -> tuple[list[jax.Array], list[Any]]:
    """Queries, scaled, keys and values of a head, and what `unprepared` needs of the first two."""
    (q, q_back), (k, k_back) = (image.prepared(read[n, i], n) for n in (0, 1))
    return [q * (LOG2_E * image.shape.size**-0.5), k, read[2, i]], [q_back, k_back]


def _loop(count: int, run: Callable[[Any], None]) -> None:
    if count == 1:
        run(0)
    else:
        lax.fori_loop(0, count, lambda n, _: run(n), None)
