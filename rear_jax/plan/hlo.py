"""Reading a compiled program's text (HLO): what it sends over the network, and what it moves through memory.

`compiled.cost_analysis()` counts the body of a loop once; here every instruction counts as often as it runs. The text
is that of `compiled.as_text()`, of one device.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from rear_jax.plan.layouts import Array, arrays

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
UNMOVED = {  # instructions that move nothing, or whose parts are counted on their own
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "iota", "opt-barrier", "async-done", "async-update", "copy-done", "slice-done"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
READS_A_PART = ("dynamic-slice", "slice", "gather")

_FREE = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"')  # moves nothing
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: name, result, opcode, names of operands, and the rest of the line."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def main(self) -> int:
        """Bytes of the result in main memory."""
        return sum(array.size for array in self.arrays if array.main)

    def called(self) -> dict[str, str]:
        """Computations that it calls, by their role."""
        return dict(_CALLED.findall(self.attributes))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last one's name is `root`'s unless the text says otherwise."""

    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: of COLLECTIVES.
      size: bytes of the whole array as it is laid out: what an all-gather makes, and what others take.
      group: devices that take part together.
      times: how often it runs in a call of the program.
      reach: of the smallest blocks of devices, a power of two and aligned, none of which a group leaves.
    """

    kind: str
    size: int
    group: int
    times: int
    reach: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a call, by ring algorithms (as of NCCL and XLA)."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.size * factor


def parse(text: str) -> Module:
    """Reads the text of a compiled program."""
    computations, entry, name, instructions, root = {}, "", "", {}, ""
    for line in _whole_lines(text):
        if head := _COMPUTATION.match(line):
            name, instructions, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif name and line.rstrip() == "}":
            computations[name] = Computation(name, instructions, root)
            name = ""
        elif name and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[2], found[3])
            instructions[instruction.name] = instruction
            root = instruction.name if found[1] else root
    return Module(computations, entry)


def executed(module: Module) -> Iterator[tuple[Computation, Instruction, int]]:
    """Every instruction of the program outside fusions, where it stands, and how often it runs in a call."""
    yield from _executed(module, module.computations[module.entry], 1)


def collectives(module: Module) -> list[Collective]:
    """Every collective of a program.

    One that runs in the background may be spread over several fusions of a computation, which share its channel.
    """
    found = {}
    for computation, instruction, times in executed(module):
        for place, inner in _with_fused(module, computation, instruction):
            kind = inner.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            size, groups = _operand_bytes(place, inner), _groups(inner.attributes)
            group = groups.shape[1]
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            key = computation.name, channel[1] if channel else inner.name
            if kind == "all-gather":
                size *= group
            if place.name.startswith("all-reduce-scatter"):  # how the TPU compiler writes it
                kind = "reduce-scatter"
            found[key] = Collective(kind, size, group, times, _reach(groups))
    return [collective for collective in found.values() if collective.group > 1]


def bytes_moved(module: Module) -> int:
    """Bytes that a device reads from and writes to its main memory in a call, an estimate.

    Every instruction reads its operands and writes its result, fusions and kernels as one; where only a slice of an
    operand is read or written in place, the slice counts. Arrays count as they are laid out, with what fills their last
    tiles. Caches other than those that the compiler manages itself are not seen.
    """
    return sum(times * _moved(module, place, instruction) for place, instruction, times in executed(module))


def estimated_cycles(module: Module) -> int:
    """Cycles of all fusions in a call by the TPU compiler's own cost model, which it notes beside them; 0 elsewhere."""
    noted = ((re.search(r'"estimated_cycles":"(\d+)"', i.attributes), times) for _, i, times in executed(module))
    return sum(times * int(found[1]) for found, times in noted if found)


def _whole_lines(text: str) -> list[str]:
    """Lines, with what an instruction says of itself in one line with it: a kernel's words may take several."""
    lines = []
    for line in text.splitlines():
        if lines and _INSTRUCTION.match(lines[-1]) and not (_INSTRUCTION.match(line) or line.rstrip() == "}"):
            lines[-1] += line
        else:
            lines.append(line)
    return lines


def _instruction(name: str, text: str) -> Instruction:
    opcode = _OPCODE.search(text)
    end = _closing(text, opcode.end())
    operands = tuple(re.findall(r"%([\w.\-]+)", text[opcode.end() : end]))
    inner = text[opcode.end() : end] if opcode[1] in ("parameter", "constant") else ""
    return Instruction(name, arrays(text[: opcode.start()]), opcode[1], operands, inner + text[end:])


def _closing(text: str, start: int) -> int:
    """Where the bracket that is open at `start` is closed."""
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    return len(text)


def _executed(module: Module, computation: Computation, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
    for instruction in computation.instructions.values():
        yield computation, instruction, times
        called = instruction.called()
        if instruction.opcode == "while":
            trips = _trips(module, instruction)
            yield from _executed(module, module.computations[called["body"]], times * trips)
        elif instruction.opcode in ("call", "async-start"):
            name = called.get("to_apply") or called["calls"]
            yield from _executed(module, module.computations[name], times)
        elif instruction.opcode == "conditional":
            for name in _branches(instruction):
                yield from _executed(module, module.computations[name], times)


def _trips(module: Module, loop: Instruction) -> int:
    """How often a loop's body runs: what is noted, else where its counter, from 0, comes to the end.

    A loop whose end depends on data counts once.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition, body = (module.computations[loop.called()[role]] for role in ("condition", "body"))
    compared = condition.instructions[condition.root]
    if "direction=LT" not in compared.attributes:
        return 1
    counter, limit = (condition.instructions[name] for name in compared.operands)
    if limit.opcode != "constant":
        return 1
    return -(-_number(limit) // _step(body, _index(counter)))


def _step(body: Computation, index: int | None) -> int:
    """By how much a loop's body increases part `index` of what it carries; 1 where it is not seen."""
    root, total = body.instructions[body.root], 0
    if index is None or root.opcode != "tuple":
        return 1
    value = body.instructions[root.operands[index]]
    while value.opcode == "add":
        parts = sorted((body.instructions[name] for name in value.operands), key=lambda one: one.opcode == "constant")
        if parts[1].opcode != "constant":
            return 1
        value, total = parts[0], total + _number(parts[1])
    return total if total > 0 and _index(value) == index else 1


def _number(constant: Instruction) -> int:
    return int(re.match(r"-?\d+", constant.attributes)[0])


def _index(instruction: Instruction) -> int | None:
    """Which part of a tuple an instruction takes."""
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if instruction.opcode == "get-tuple-element" and found else None


def _branches(instruction: Instruction) -> list[str]:
    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if listed:
        return re.findall(r"%?([\w.\-]+)", listed[1])
    called = instruction.called()
    return [called["true_computation"], called["false_computation"]]


def _with_fused(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction, and those of the computation that it fuses."""
    yield computation, instruction
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called()["calls"]]
        for inner in inside.instructions.values():
            yield from _with_fused(module, inside, inner)


def _operand_bytes(computation: Computation, instruction: Instruction) -> int:
    return sum(computation.instructions[name].size for name in instruction.operands)


def _groups(attributes: str) -> np.ndarray:
    """Numbers [groups, devices] of who takes part together, in any of the ways in which it is written."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        together = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", mesh[3])]
        devices = _iota(mesh[2] or f"[{math.prod(sizes.values())}]").reshape(*sizes.values())
        devices = np.moveaxis(devices, together, range(-len(together), 0))
        return devices.reshape(-1, math.prod(devices.shape[-len(together) :]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:, |$)", attributes):
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(device) for device in one.split(",")] for one in re.findall(r"[\d,]+\d|\d", listed[1])])
    return np.zeros((1, 1), int)


def _iota(text: str) -> np.ndarray:
    """Devices numbered in a grid whose axes are then permuted, such as '[2,4]T(1,0)'."""
    shape, axes = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    grid = np.arange(math.prod(map(int, shape.split(",")))).reshape(*map(int, shape.split(",")))
    return grid.transpose(*map(int, axes.split(","))) if axes else grid


def _reach(groups: np.ndarray) -> int:
    """See `Collective`."""
    return max(1 << int(low ^ high).bit_length() for low, high in zip(groups.min(1), groups.max(1), strict=True))


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes that one run of an instruction moves."""
    opcode = instruction.opcode
    if opcode in UNMOVED or _FREE.search(instruction.attributes):
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "custom-call":  # a kernel may be given one array several times, to take another part of it each time
        operands = list({operand.name: operand for operand in operands}.values())
    if opcode == "fusion":
        inside = module.computations[instruction.called()["calls"]]
        read = sum(_read(module, inside, index, operand.main) for index, operand in enumerate(operands))
        return read + _written(module, inside, instruction)
    if opcode in READS_A_PART:
        return 2 * instruction.main
    if opcode == "dynamic-update-slice":
        return 2 * operands[1].main
    if opcode in ("copy-start", "slice-start"):  # its result holds the operand as well
        made = instruction.arrays[0 if opcode == "copy-start" else 1]
        return made.size * (bool(operands[0].main) + made.main)
    return sum(operand.main for operand in operands) + instruction.main


def _read(module: Module, inside: Computation, index: int, size: int) -> int:
    """Bytes that a fusion reads of its operand `index`, which has `size`: of slices where it takes nothing else."""
    instructions = inside.instructions.values()
    parameter = next(
        i.name for i in instructions if i.opcode == "parameter" and i.attributes.split(")")[0] == str(index)
    )
    parts = [_part_read(module, user, name, size) for user, name in _users(inside, parameter)]
    return min(size, sum(parts)) if parts else size


def _users(inside: Computation, name: str) -> list[tuple[Instruction, str]]:
    """Who reads a value, through bitcasts, and under what name."""
    users = []
    for instruction in inside.instructions.values():
        if name in instruction.operands:
            through = instruction.opcode == "bitcast" and instruction.name != inside.root
            users += _users(inside, instruction.name) if through else [(instruction, name)]
    return users


def _part_read(module: Module, user: Instruction, name: str, size: int) -> int:
    """Bytes of a value of so many that one instruction in a fusion reads."""
    place = user.operands.index(name)
    if user.opcode == "fusion":
        return _read(module, module.computations[user.called()["calls"]], place, size)
    if place == 0 and user.opcode in READS_A_PART:
        return user.size
    return 0 if place == 0 and user.opcode == "dynamic-update-slice" else size  # which updates in place


def _written(module: Module, inside: Computation, fusion: Instruction) -> int:
    """Bytes that a fusion writes: the update alone of an array that it updates in place."""
    root = inside.instructions[inside.root]
    roots = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(fusion.arrays):
        return fusion.main
    made = zip(roots, fusion.arrays, strict=True)
    return sum(_update(module, inside, value, array.size) for value, array in made if array.main)


def _update(module: Module, inside: Computation, value: Instruction, size: int) -> int:
    """Bytes that are written of one result of a fusion, which has `size`."""
    if value.opcode == "bitcast":
        return _update(module, inside, inside.instructions[value.operands[0]], size)
    if value.opcode == "fusion":
        nested = module.computations[value.called()["calls"]]
        return _update(module, nested, nested.instructions[nested.root], size)
    return inside.instructions[value.operands[1]].size if value.opcode == "dynamic-update-slice" else size
