"""How many bundles a Pallas kernel takes on a TPU that is not here: by them its formula in a plan is to be checked.

The TPU compiler compiles a function of arrays, and writes the last schedule of every kernel in it. A bundle is what a
core issues in one cycle; it counts as often as its loops run. This is an estimate: a core that waits for memory or for
a busy unit is not seen, and what a branch may skip counts as if it ran.

python benchmarks/kernel_bundles.py FUNCTION ARRAY... [--static NAME=VALUE...] [--gradient] [--near] \\
    [--topology NAME...]
python benchmarks/kernel_bundles.py rear_jax.generators.attention_kernels:splash_attention 'bfloat16[8,258,12,64]' \\
    'bfloat16[8,258,12,64]' 'bfloat16[8,258,12,64]' --gradient --topology v5e:1x1 v6e:1x1

It needs jax[tpu]. FUNCTION is module:name or file.py:name. An ARRAY is its type and shape. --gradient also takes the
derivatives in the floating-point arrays. --near lets the compiler keep operands in the chip's cache, from which the
core copies them itself.
"""

import argparse
import ast
import dataclasses
import functools
import importlib
import os
import pathlib
import re
import runpy
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import measure

from rear_jax.plan import chips, hlo, kernels

LAST = "final_bundles"  # the pass whose schedules are kept, of about 70
STAGES = 2  # more runs of a pipelined loop over the grid than it has steps: the first fetches, the last writes
FAR = {"xla_msa_enable": False}  # operands are in the main memory, as large ones are

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(LB)?(?:[A-Z]{2})? *: (>*) *\{(.*)$")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+)?\S* /\* loop exit test \*/")


@dataclasses.dataclass
class Loop:
    """Bundles of a loop's body outside the loops in it, and those loops.

    Attributes:
      runs: of the body; 1 for what is no loop, and for a loop whose end depends on data.
      own: bundles.
      inner: loops in it, in order.
      known: whether `runs` is.
    """

    runs: int = 1
    own: int = 0
    inner: list["Loop"] = dataclasses.field(default_factory=list)
    known: bool = False

    @property
    def body(self) -> int:
        """Bundles of one run."""
        return self.own + sum(loop.runs * loop.body for loop in self.inner)

    def __str__(self) -> str:
        loops = (f"{loop.runs if loop.known else '?'} * ({loop})" for loop in self.inner)
        return " + ".join((str(self.own), *loops))


def schedule(text: str) -> Loop:
    """The loops of a kernel, from the text of its last schedule."""
    stack, untested = [Loop()], []
    for found in filter(None, map(_BUNDLE.match, text.splitlines())):
        head, depth, bundle = found[1], len(found[2]), found[3]
        if not bundle.startswith("}"):  # an empty bundle does not say where it stands
            del stack[depth + 1 - bool(head) :]
        if head:
            loop = Loop()
            stack[-1].inner.append(loop)
            stack.append(loop)
            untested.append((loop, STAGES if "iteration index, stage" in bundle else 0))
        stack[-1].own += 1
        if end := _EXIT.search(bundle):  # the test of an inner loop comes first, but may stand behind its last bundle
            loop, more = untested.pop()
            if end[1]:
                loop.runs, loop.known = int(end[1]) - more, True
    return stack[0]


def found(name: str) -> Callable[..., Any]:
    """The function of a flag."""
    place, _, function = name.rpartition(":")
    if place.endswith(".py"):
        return runpy.run_path(place)[function]
    return getattr(importlib.import_module(place), function)


def array(text: str, device: jax.Device) -> jax.ShapeDtypeStruct:
    """The array of a flag."""
    kind, dims = re.fullmatch(r"(\w+)\[([\d,]*)\]", text).groups()
    shape = tuple(int(dim) for dim in dims.split(",") if dim)
    return jax.ShapeDtypeStruct(shape, kind, sharding=jax.sharding.SingleDeviceSharding(device))


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that returns its value and its derivatives in the floating-point arrays, for a cotangent of 1."""

    def both(*arrays):
        floats = [index for index, one in enumerate(arrays) if jnp.issubdtype(one.dtype, jnp.floating)]

        def of_floats(*values):
            given = dict(zip(floats, values, strict=True))
            return function(*(given.get(index, one) for index, one in enumerate(arrays)))

        value, pull = jax.vjp(of_floats, *(arrays[index] for index in floats))
        return value, pull(jax.tree.map(jnp.ones_like, value))

    return both


def compiled(
    function: Callable[..., Any], arrays: list[str], topology: chips.Topology, folder: pathlib.Path, near: bool
) -> Iterator[tuple[kernels.Kernel, Loop]]:
    """Each kernel of a function, and its loops; the compiler must write schedules to `folder`."""
    given = (array(one, topology.devices[0]) for one in arrays)
    text = jax.jit(function).lower(*given).compile(None if near else FAR).as_text()
    for kernel in kernels.found(hlo.parse(text)):
        files = sorted(folder.glob(f"*-{kernel.instruction}-[0-9]*-{LAST}.txt"))
        yield kernel, schedule(files[-1].read_text())


def row(topology: chips.Topology, kernel: kernels.Kernel, loops: Loop) -> tuple[str, ...]:
    """Of the table: with the cycles that a plan counts, where it has a formula."""
    formula = kernels.cycles(kernel, topology.kind)
    planned = f"{formula / topology.chip.cores:.0f}" if formula else ""
    return topology.name, kernel.name, str(loops), str(loops.body), planned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function")
    parser.add_argument("arrays", nargs="+")
    parser.add_argument("--static", nargs="*", default=[])
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--near", action="store_true")
    parser.add_argument("--topology", nargs="*", default=["v5e:1x1"])
    arguments = parser.parse_args()
    static = {name: ast.literal_eval(value) for name, value in (one.split("=", 1) for one in arguments.static)}
    function = functools.partial(found(arguments.function), **static)
    function = with_gradient(function) if arguments.gradient else function
    rows = [("chip", "kernel", "loops", "bundles of a core", "cycles in a plan")]
    with tempfile.TemporaryDirectory() as folder:
        flags = {"to": folder, "llo_text": "true", "llo_pass_label_regex": LAST}
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_dump_{name}={value}" for name, value in flags.items())
        for topology in map(chips.topology, arguments.topology):
            given = arguments.arrays, topology, pathlib.Path(folder), arguments.near
            rows += [row(topology, *one) for one in compiled(function, *given)]
    measure.table(rows)


if __name__ == "__main__":
    main()
