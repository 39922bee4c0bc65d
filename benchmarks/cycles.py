"""Where the cycles of a program go on a TPU that is not here, by the compiler's own cost model: its operations, summed.

python benchmarks/cycles.py --config=configs/rear_b.py [--topology=v5e:4x4] [--program=sample] [--rows=30] \\
    [model.depth=8 ...]

It needs jax[tpu]. Operations count as often as they run. Those of one kind with results of one shape are one row,
whatever layer they are of. Custom kernels have no cycles here, `rear_jax.main --job=plan` estimates theirs.
"""

import argparse
import ast
import re
from collections import defaultdict

import measure

from rear_jax.plan import chips, hlo, roofline

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


def by_operation(module: hlo.Module) -> dict[tuple[str, str, int], list[int]]:
    """(what it is from, shape of the result, runs of its loop) -> cycles of each operation of that kind in a call."""
    found = defaultdict(list)
    for _, instruction, times in hlo.executed(module):
        if cycles := _CYCLES.search(instruction.attributes):
            source = _SOURCE.search(instruction.attributes)
            name = "/".join(source[1].split("/")[-3:]) if source else re.sub(r"[.\d]+$", "", instruction.name)
            shape = "x".join(map(str, instruction.arrays[0].dims)) if instruction.arrays else ""
            found[name, shape, times].append(times * int(cycles[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--program", default="sample", choices=list(roofline.PROGRAMS))
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    config, topology = measure.read_config(arguments.config), chips.topology(arguments.topology)
    for name, value in (setting.split("=", 1) for setting in arguments.settings):
        config.update_from_flattened_dict({name: ast.literal_eval(value)})
    executable = roofline.compile_fitting(config, arguments.program, topology).executable
    if executable is None:
        raise SystemExit("The program does not fit into the memory of a chip.")
    module = hlo.parse(executable.as_text())
    total, moved = hlo.estimated_cycles(module), hlo.bytes_moved(module)
    clock, bandwidth = topology.chip.clock, topology.chip.bandwidth
    print(f"{total / 1e6:.1f} million cycles ({1e3 * total / clock:.1f} ms) and {moved / 1e9:.1f} GB", end=" ")
    print(f"({1e3 * moved / bandwidth:.1f} ms) of a chip in a call of {arguments.program}\n")
    rows = sorted(by_operation(module).items(), key=lambda row: -sum(row[1]))[: arguments.rows]
    shares = ((what, shape, times, len(each), sum(each)) for (what, shape, times), each in rows)
    measure.table(
        [
            ("operation", "result", "runs", "operations", "million cycles", "share"),
            *((*row, f"{all_ / 1e6:.1f}", f"{100 * all_ / total:.1f} %") for *row, all_ in shares),
        ]
    )


if __name__ == "__main__":
    main()
