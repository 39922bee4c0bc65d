"""Custom kernels (Pallas) of a program for TPUs, of which the compiler's cost model counts no cycle.

A kernel's cycles are those of its own formula, which is found by the name that it gives `pl.pallas_call`. It is a
formula in the shapes of the call. Its numbers are bundles of the kernel's last schedule on v5e, as
`benchmarks/kernel_bundles.py` counts them: what the kernel waits for does not count. v5p and v6e take as many within
15 %. v4 takes more, as it multiplies no integers of 32 bits at once, of which the hash of dropout is made.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from rear_jax.generators.fused_kernels import Shape
from rear_jax.plan.hlo import Module, executed
from rear_jax.plan.layouts import Array

TARGET = 'custom_call_target="tpu_custom_call"'

_NAME = re.compile(r'op_name="[^"]*?(\w+)\)*/pallas_call"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a kernel.

    Attributes:
      name: that the kernel gives itself.
      instruction: its line in the program.
      operands, results: in order, each operand as often as it is passed.
      times: how often it runs in a call of the program.
    """

    name: str
    instruction: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    times: int


def found(module: Module) -> list[Kernel]:
    """Every kernel of a program."""
    calls = []
    for place, call, times in executed(module):
        if call.opcode == "custom-call" and TARGET in call.attributes:
            name = _NAME.search(call.attributes)
            operands = tuple(array for operand in call.operands for array in place.instructions[operand].arrays)
            named = name[1] if name else call.name.split(".")[0]
            calls.append(Kernel(named, call.name, operands, call.arrays, times))
    return calls


def cycles(kernel: Kernel, chip: str) -> float | None:
    """Of one run, on one core of a chip such as 'v5e'; None for a kernel without a formula."""
    slower = SLOWER.get(chip, {}).get(kernel.name, 1.0)
    return slower * CYCLES[kernel.name](kernel) if kernel.name in CYCLES else None


def _splash(step: int, block: int, ends: int) -> Callable[[Kernel], float]:
    """Of JAX's splash attention, causal, in blocks of 128 positions of at most 128 features.

    Args:
      step: bundles of every pair of blocks, also of one that is skipped because all of it comes later.
      block: more where a pair is computed.
      ends: more at the first and the last pair of a row.
    """

    def formula(kernel: Kernel) -> float:
        *heads, length, _ = kernel.operands[2].dims  # the queries, behind two tables
        blocks = length // 128
        return math.prod(heads) * (blocks**2 * step + blocks * (blocks + 1) // 2 * block + blocks * ends)

    return formula


def _fused(scores: float, dropout: float, features: float, read: float, norm: float, turn: float):
    """Of our fused attention: a least-squares fit to twelve shapes, within 5 % forward and 12 % backward.

    The words of dropout are the first operand, the projection [B, T, 3 W] is the second. Then come, in some order, the
    norms [D, n], the turns [2, b, D, T], and others.

    Args:
      scores: bundles of every register of scores.
      dropout: more where attention weights are dropped.
      features: more for every 16 features of a head.
      read: bundles of every register of queries, [D, T].
      norm, turn: more where queries and keys are normalised, and where they are rotated.
    """

    def formula(kernel: Kernel) -> float:
        (words,), (batch, length, features_3), *others = (array.dims for array in kernel.operands)
        norms = [dims for dims in others if len(dims) == 2]
        turns = [dims for dims in others if len(dims) == 4]
        drops = words > 1
        size = norms[0][0] if norms else turns[0][2] if turns else features_3 // 3 // (words // (2 * batch))
        heads = features_3 // 3 // size
        registers = sum(part.registers for part in Shape(heads, size, length).parts())
        of_scores = registers * (scores + dropout * drops + features * size / 16)
        of_heads = size / 8 * math.ceil(length / 128) * (read + norm * bool(norms) + turn * bool(turns))
        return batch * heads * (of_scores + of_heads)

    return formula


def _modulated(fixed: float, register: float, dropout: float = 0.0) -> Callable[[Kernel], float]:
    """Of our norms, gates and dropout between products: a fit to five shapes, within 10 %.

    The words of dropout are the first operand, [1] without any. The second is [B, T, W].

    Args:
      fixed: bundles of every 16 positions.
      register: more for every register of their features.
      dropout: more for every such register where features are dropped.
    """

    def formula(kernel: Kernel) -> float:
        (words,), (batch, length, width) = (array.dims for array in kernel.operands[:2])
        registers = 2 * math.ceil(width / 128)
        return batch * (length // 16 + 1.4) * (fixed + registers * (register + dropout * (words > 1)))

    return formula


CYCLES: Mapping[str, Callable[[Kernel], float]] = {
    "fused_attention_forward": _fused(3.82, 2.61, 0.60, 2.87, 3.87, 1.59),
    "fused_attention_backward": _fused(9.92, 1.87, 0.99, 0.0, 18.1, 0.0),
    "modulated_norm_forward": _modulated(40.0, 3.75),
    "modulated_norm_backward": _modulated(18.0, 10.3),
    "gated_norm_forward": _modulated(42.0, 4.3, 4.3),
    "gated_norm_backward": _modulated(5.0, 12.2, 4.1),
    "gated_backward": _modulated(11.0, 1.3, 3.4),
    "splash_mha_fwd_no_residuals": _splash(317, 246, 165),
    "splash_mha_fwd_residuals": _splash(334, 246, 181),
    "splash_mha_dkv_no_residuals": _splash(463, 222, 109),
    "splash_mha_dq_no_residuals": _splash(309, 248, 60),
}
SLOWER: Mapping[str, Mapping[str, float]] = {  # chip -> kernel -> times as many bundles of a core as v5e, with dropout
    "v4": {
        "fused_attention_forward": 2.0,
        "fused_attention_backward": 1.5,
        "modulated_norm_forward": 1.8,
        "modulated_norm_backward": 1.9,
        "gated_norm_forward": 3.7,
        "gated_norm_backward": 3.5,
        "gated_backward": 6.0,
    }
}
