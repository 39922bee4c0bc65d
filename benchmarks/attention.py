"""Time and rounding of every attention kernel that runs here, forward and backward, with dropout and without.

python benchmarks/attention.py [--batch=64] [--shapes=rear_b,rear_l] [--kernels=plain,flash] [--dtype=float32]
python benchmarks/attention.py --shapes=toy --batch=2 --interpret    # on a CPU: what our kernels compute, slowly

Before a kernel is timed, its output and its gradients are compared with those of the plain form in float32, with the
same mask of dropout: the largest difference, as a share of the largest value. Without dropout they are compared with
cuDNN's too, where it runs. A kernel whose difference is more than twice that of the plain form in the same dtype is
called wrong and is not timed, and the command fails. FLOP/s are those of the causal half of seven products.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from jaxtyping import Array, Float

from rear_jax.errors import RearError
from rear_jax.generators.attention import self_attention
from rear_jax.generators.attention_kernels import KERNELS, LIBRARY, OURS, Task, choose
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.heads import Preparation

HEAD = (
    "shape",
    "dropout",
    "kernel",
    "difference from float32",
    "from cuDNN",
    "ms forward and backward, median (min to max)",
    "TFLOP/s",
    "times plain",
)
PRODUCTS = 7  # of [T, T] with D: two going forward, five going back
SLACK = 2.0  # a kernel may differ from float32 by so much more than the plain form does


class Size(NamedTuple):
    """Positions, heads and features of a head."""

    length: int
    heads: int
    size: int


SHAPES = {
    "rear_b": Size(258, 16, 48),
    "rear_l": Size(258, 16, 64),
    "llamagen_l": Size(256, 16, 64),
    "llamagen_l_384": Size(576, 16, 64),
    "toy": Size(20, 8, 16),
}
Attention = Callable[[jax.Array], jax.Array]  # projection [B, T, 3, H, D] -> outputs [B, T, H D]


def attention_of(name: str, rate: float, batch: int, *, interpret: bool) -> Attention:
    """A kernel, of heads that need no preparation."""
    dropout = Dropout.of(jax.random.key(1), jnp.arange(batch)) if rate else None
    if name in OURS:
        return lambda qkv: OURS[name](qkv, Preparation(), None, rate, dropout, interpret=interpret)
    if name in LIBRARY:
        return lambda qkv: LIBRARY[name](*Preparation().apply(qkv)).reshape(*qkv.shape[:2], -1)
    return lambda qkv: self_attention(qkv, Preparation(), kernel=name, rate=rate, dropout=dropout)


def obstacle(name: str, size: Size, rate: float, dtype: str, *, interpret: bool) -> str:
    """Why a kernel cannot run here; '' if it can."""
    if interpret and name in OURS:
        return ""
    try:
        choose(name, Task(dtype, *size, rate=rate, masked=False))
    except RearError as error:
        return str(error).split("'", 2)[2].split(": use")[0].strip()
    return ""


def results(attention: Attention, qkv: jax.Array, weights: jax.Array) -> list[np.ndarray]:
    """Outputs, and the gradients of queries, keys and values, in float32."""

    @jax.jit
    def run(qkv, weights):
        out, pull_back = jax.vjp(attention, qkv)
        return out, *jnp.moveaxis(pull_back(weights)[0], 2, 0)

    return [np.asarray(x, np.float32) for x in run(qkv, weights)]


def difference(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest, as a share of the largest value of its array; infinite where something is no number."""
    shares = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True)]
    return float(np.nan_to_num(max(shares), nan=np.inf)) if np.isfinite(shares).all() else np.inf


def seconds_of(attention: Attention, qkv: Float[Array, "B T 3 H D"], calls: int, repeats: int) -> list[float]:
    """Of one call forward and backward, from runs of several: each takes the gradient of the last as its projection."""

    def call(_, qkv):
        out, pull_back = jax.vjp(attention, qkv)
        return pull_back(out)[0]

    run = jax.jit(lambda qkv: jax.lax.fori_loop(0, calls, call, qkv))
    return [seconds / calls for seconds in measure.timed(run, lambda _: (qkv,), repeats)[0]]


class Case(NamedTuple):
    """A shape and a rate of dropout, and what is known of it so far.

    Attributes:
      shape, rate: see there.
      qkv, weights: the projection [B, T, 3, H, D], and the gradient of the outputs [B, T, H D].
      exact: `results` of the plain form in float32.
      found: those of the kernels.
      fastest: seconds of the kernels.
    """

    shape: str
    rate: float
    qkv: jax.Array
    weights: jax.Array
    exact: list[np.ndarray]
    found: dict[str, list[np.ndarray]]
    fastest: dict[str, float]

    @classmethod
    def of(cls, shape: str, rate: float, batch: int, dtype: str) -> "Case":
        """With random numbers."""
        size = SHAPES[shape]
        rows = (batch, size.length)
        qkv, weights = (
            jax.random.normal(jax.random.key(n), dims).astype(dtype)
            for n, dims in enumerate([(*rows, 3, size.heads, size.size), (*rows, size.heads * size.size)])
        )
        with jax.default_matmul_precision("highest"):
            wide = (x.astype(jnp.float32) for x in (qkv, weights))
            exact = results(attention_of("plain", rate, batch, interpret=False), *wide)
        return cls(shape, rate, qkv, weights, exact, {}, {})

    @property
    def operations(self) -> int:
        """FLOPs: the causal half, two for each product and sum."""
        batch, length, _, heads, size = self.qkv.shape
        return PRODUCTS * batch * heads * length**2 * size


def measured(name: str, case: Case, arguments, wrong: list[str]) -> tuple[str, ...]:
    """The cells of a kernel's row behind its name; `wrong` is told if it is."""
    if reason := obstacle(name, SHAPES[case.shape], case.rate, arguments.dtype, interpret=arguments.interpret):
        return reason, "", "", "", ""
    attention = attention_of(name, case.rate, arguments.batch, interpret=arguments.interpret)
    found, failure = measure.guarded(functools.partial(results, attention, case.qkv, case.weights))
    if failure:
        return failure, "", "", "", ""
    case.found[name] = found
    off, allowed = (difference(case.found[one], case.exact) for one in (name, "plain"))
    beside = f"{difference(found, case.found['cudnn']):.1e}" if "cudnn" in case.found else ""
    if off > SLACK * allowed + 1e-5:
        wrong.append(f"{name} at {case.shape} with dropout {case.rate}")
        return f"{off:.1e}: wrong", beside, "", "", ""
    work = functools.partial(seconds_of, attention, case.qkv, arguments.calls, arguments.repeats)
    seconds, failure = measure.guarded(work)
    if failure:
        return f"{off:.1e}", beside, failure, "", ""
    case.fastest[name] = min(seconds)
    speed = f"{case.operations / statistics.median(seconds) / 1e12:.3g}"
    times = f"{min(seconds) / case.fastest['plain']:.2f}" if "plain" in case.fastest else ""
    return f"{off:.1e}", beside, measure.about([1e3 * one for one in seconds]), speed, times


def rows(arguments, wrong: list[str]) -> Iterator[tuple]:
    """The table, the plain form first of each shape and rate."""
    yield HEAD
    for shape, rate in itertools.product(arguments.shapes, (0.0, arguments.dropout)):
        make = functools.partial(Case.of, shape, rate, arguments.batch, arguments.dtype)
        case, failure = measure.guarded(make)
        if failure:
            yield shape, rate, "plain, float32", failure, "", "", "", ""
            continue
        for name in ("plain", *arguments.kernels):
            if name == "plain" or "plain" in case.found:
                yield shape, rate, name, *measured(name, case, arguments, wrong)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in KERNELS if name not in ("auto", "plain")]
    kernels = sorted(names, key=lambda name: name != "cudnn")  # first, for the others to be compared with
    parser.add_argument("--shapes", default="rear_b,rear_l,llamagen_l", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--kernels", default=",".join(kernels), help="beside the plain form")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1, help="beside none")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--calls", type=int, default=10, help="of a timed run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--interpret", action="store_true", help="run our kernels' Python, on any platform")
    arguments = parser.parse_args()
    arguments.shapes, arguments.kernels = (x.split(",") for x in (arguments.shapes, arguments.kernels))
    if unknown := {*arguments.shapes} - SHAPES.keys() | {*arguments.kernels} - {*kernels}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return arguments


def main() -> None:
    arguments, wrong = parse(), []
    measure.header(measure.matmul_ceiling(arguments.dtype), arguments.dtype)
    measure.table(rows(arguments, wrong))
    if wrong:
        sys.exit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
