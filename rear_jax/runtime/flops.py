"""Counting floating-point operations in what JAX traces, before any compiler sees it."""

import math
from collections import Counter
from typing import Any

import jax

HALF = "bfloat16"  # the kind of products of two-byte factors; those of wider ones are called after their precision


def count(jaxpr: Any) -> int:
    """Operations of matrix products and convolutions, over all devices; two for each multiplication and addition.

    A scanned layer counts as often as it runs, which a compiled program's `cost_analysis()` does not do; causal
    attention counts whole, as is the custom (PaLM, arXiv 2204.02311, appendix B). Of branches the largest counts, and a
    loop whose end depends on data counts once. A Pallas kernel counts what it says of itself, see `_kernel`. The jaxpr
    is that of `jitted.trace(...)`, or one inside it.
    """
    return by_precision(jaxpr).total()


def by_precision(jaxpr: Any) -> Counter[str]:
    """The same by kind: 'bfloat16' for two-byte factors, else the precision: 'default', 'high' or 'highest'."""
    return sum((_of(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns), Counter())


def _of(equation: Any) -> Counter[str]:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        left = equation.invars[0].aval.shape
        contracted = math.prod(left[axis] for axis in parameters["dimension_numbers"][0][0])
        return Counter({_kind(equation): 2 * contracted * math.prod(equation.outvars[0].aval.shape)})
    if name == "conv_general_dilated":
        return Counter({_kind(equation): _convolution(equation)})
    if name == "cond":
        return max(map(by_precision, parameters["branches"]), key=Counter.total)
    if name == "pallas_call":
        return _kernel(parameters)
    times = parameters["length"] if name == "scan" else _devices(parameters) if name == "shard_map" else 1
    inner = [by_precision(inner) for value in parameters.values() for inner in _jaxprs(value)]
    return Counter({kind: times * operations for kind, operations in sum(inner, Counter()).items()})


def _kernel(parameters: dict[str, Any]) -> Counter[str]:
    """Of a Pallas kernel: the operations of its `cost_estimate`, of the kinds of the products in its body.

    Without an estimate its body counts at every step of the grid.
    """
    body, estimate = by_precision(parameters["jaxpr"]), parameters["cost_estimate"]
    steps = math.prod(size for size in parameters["grid_mapping"].grid if isinstance(size, int))
    whole = int(estimate.flops) if estimate else steps * body.total()
    return Counter({kind: whole * operations // body.total() for kind, operations in body.items()})


def _devices(parameters: dict[str, Any]) -> int:
    """How many run the body of a `shard_map`, each with shapes of its own part."""
    return math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])


def _kind(equation: Any) -> str:
    if min(factor.aval.dtype.itemsize for factor in equation.invars) <= 2:
        return HALF
    precision = equation.params["precision"]
    both = {precision} if not isinstance(precision, tuple) else set(precision)
    return min((one or jax.lax.Precision.DEFAULT for one in both), key=lambda one: one.value).name.lower()


def _convolution(equation: Any) -> int:
    """Products with the zeros between the elements of a dilated input do not count, those with its padding do."""
    kernel, output = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    taps = math.prod(kernel) // out_channels
    return 2 * taps * math.prod(output) // math.prod(equation.params["lhs_dilation"])


def _jaxprs(value: Any) -> list[Any]:
    """Those in a parameter of a primitive: of a call, a scan, a checkpoint."""
    if isinstance(value, list | tuple):
        return [inner for item in value for inner in _jaxprs(item)]
    return [value] if hasattr(value, "eqns") or hasattr(value, "jaxpr") else []
