"""What a compiled program takes of a chip, and the least time that it can run in (the roofline model)."""

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax.plan import hlo, kernels, programs
from rear_jax.plan.chips import GIB, Topology
from rear_jax.plan.programs import PROGRAMS, Program, microbatches_of, with_batch
from rear_jax.runtime import flops, sharding
from rear_jax.runtime.mesh import make_mesh
from rear_jax.runtime.precision import standing_in_for
from rear_jax.training import fitting

log = logging.getLogger(__name__)

HOST_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # no fast code is wanted
QUICK_OPTIONS = {"exec_time_optimization_effort": -1.0}  # of the TPU compiler


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program takes on one topology. Bytes and seconds are of each chip.

    Attributes:
      name: of the program.
      topology: see there.
      mesh: devices along each axis.
      images, calls: of `Program`.
      held: bytes that stay between calls, by what they are; 'layout' is what the chip's tiles add.
      working: bytes that come and go in a call: activations, gradients, what the compiler keeps.
      fits: whether all that is in the chip's memory.
      model_flops: of all chips in a call, by the mathematics of the step.
      flops: the same with what is computed again to save memory, by precision, see `flops.by_precision`.
      moved: bytes through the chip's memory in a call; None where the program could not be compiled.
      collectives: see there.
      cycles: of the chip, by the TPU compiler's own cost model and its kernels' formulas, if nothing overlaps; 0 where
        there is no such model, or it was not to think long.
      kernel_cycles: those of them that are of kernels.
      seconds: that compiling took.
      notes: what else the reader must know, a sentence each.
      accumulation, remat: the microbatches of the program and what it recomputes, by the config or as they fit.
    """

    name: str
    topology: Topology
    mesh: dict[str, int]
    images: int
    calls: int
    held: dict[str, int]
    working: int
    fits: bool
    model_flops: int
    flops: Mapping[str, int]
    moved: int | None
    collectives: list[hlo.Collective]
    cycles: int
    kernel_cycles: int
    seconds: float
    notes: tuple[str, ...] = ()
    accumulation: int = 1
    remat: str = "none"

    @property
    def memory(self) -> int:
        """Bytes that each chip needs."""
        return sum(self.held.values()) + self.working

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that a call takes at least, by what it waits for."""
        chip, count = self.topology.chip, len(self.topology.devices)
        slower = {flops.HALF: 1} | dict(chip.float32)
        passes = sum(slower[precision] * operations for precision, operations in self.flops.items())
        bounds = {"compute": passes / count / chip.flops}
        if self.moved is not None:
            sending = sum(one.sent / self.topology.network(one.reach) for one in self.collectives)
            bounds |= {"memory": self.moved / chip.bandwidth, "network": sending}
        return bounds

    @property
    def bound(self) -> float:
        """Seconds that a call takes at least, if all three overlap perfectly."""
        return max(self.bounds.values())

    @property
    def modelled(self) -> float | None:
        """Seconds of a call by the cost model; None where there is none."""
        return self.cycles / self.topology.chip.clock if self.cycles and self.topology.chip.clock else None

    def seconds_at(self, mfu: float) -> float:
        """Seconds of a call at a model FLOPs utilisation."""
        return self.model_flops / (mfu * self.topology.chip.flops * len(self.topology.devices))

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation (arXiv 2204.02311) of a call that takes so long."""
        return self.seconds_at(1.0) / seconds


class Compiled(NamedTuple):
    """A program of a config that leaves nothing open; bytes that a chip needs, inf if the compiler does not say.

    `executable` is None where the compiler refused for lack of memory, `error` then says what it said.
    """

    config: ConfigDict
    program: Program
    executable: Any
    needed: float
    error: JaxRuntimeError | None = None


def compile_fitting(config: ConfigDict, name: str, topology: Topology, *, quick: bool = False) -> Compiled:
    """Compiles the program `name` of a config for a topology, with microbatches and remat that fit if they are open.

    It chooses as a run does, see `training/fitting.py`; where nothing fits, it is what needs least. With `quick` little
    effort goes into the speed of the program, where memory is what is asked for.

    Raises RearError: the config is wrong, or its mesh or batch does not fit the topology.
    """
    if name not in fitting.JOBS or not fitting.is_open(config, name):
        return _compile(config, name, topology, quick)
    programs.check(config, name, len(topology.devices))
    mesh = make_mesh(config.mesh, topology.devices)
    with jax.set_mesh(mesh), standing_in_for(topology.platform):
        groups, tried = fitting.options(config, name, fitting.rows_of_device(config, name, mesh)), {}
    fixed = sum(held_bytes(PROGRAMS[name](config, mesh)).values())

    def attempt(choice: fitting.Choice) -> fitting.Attempt:
        tried[choice] = _compile(fitting.applied(config, name, choice), name, topology, quick)
        log.info("plan: %s with %s takes %.1f GiB", name, choice, tried[choice].needed / GIB)
        return fitting.Attempt(tried[choice].needed, tried[choice])

    return fitting.choose(groups, attempt, fitting.USED * topology.chip.memory, fixed)[1].program


def _compile(config: ConfigDict, name: str, topology: Topology, quick: bool) -> Compiled:
    mesh = make_mesh(config.mesh, topology.devices)
    program = PROGRAMS[name](config, mesh)
    options = HOST_OPTIONS if not topology.exact else QUICK_OPTIONS if quick else None
    since = time.perf_counter()
    with jax.set_mesh(mesh):
        try:
            executable = program.function.lower(*program.arguments).compile(compiler_options=options)
        except JaxRuntimeError as error:
            needed = fitting.overflow(error, sum(held_bytes(program).values()))
            return Compiled(config, program, None, needed, error)
    log.info("plan: %s compiled for %s in %.0f s", name, topology.name, time.perf_counter() - since)
    return Compiled(config, program, executable, fitting.taken(executable))


def make(config: ConfigDict, name: str, topology: Topology, *, quick: bool = False) -> Plan:
    """The plan of the program `name` of a config; arguments and errors as of `compile_fitting`."""
    since = time.perf_counter()
    compiled = compile_fitting(config, name, topology, quick=quick)
    config, program, mesh = compiled.config, compiled.program, make_mesh(config.mesh, topology.devices)
    if compiled.executable is None:
        taken = _overflow(compiled)
    else:
        taken = _taken(compiled.executable, program, topology, quick)
    seconds = time.perf_counter() - since
    return Plan(
        name=name,
        topology=topology,
        mesh=dict(mesh.shape),
        images=program.images,
        calls=program.calls,
        model_flops=_operations(config, name, topology, mesh, attention="plain", remat="none").total(),
        flops=_operations(config, name, topology, mesh, **({} if topology.exact else {"attention": "plain"})),
        seconds=seconds,
        notes=(*_notes(config, name, topology), *taken.pop("notes", ())),
        accumulation=microbatches_of(config, name),
        remat=config.model.get("remat", "none") if name in fitting.JOBS else "none",
        **({"held": held_bytes(program)} | taken),
    )


def _notes(config: ConfigDict, name: str, topology: Topology) -> tuple[str, ...]:
    """What the numbers leave out."""
    notes = ()
    if not topology.exact and name != "caption" and config.model.get("attention") == "auto":
        notes += (
            "Attention is in its plain form: a fused kernel, where the chips have one, takes less of their memory.",
        )
    if topology.chip.node:
        notes += ("All memory of a GPU counts; jax takes 75 % of it, or XLA_PYTHON_CLIENT_MEM_FRACTION.",)
    return notes


def held_bytes(program: Program) -> dict[str, int]:
    """Bytes on each chip of the arrays that a program is given."""
    return {
        what: sharding.bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))
        for what, tree in program.held.items()
        if jax.tree.leaves(tree)
    }


def largest_batch(config: ConfigDict, first: Plan, compiles: int) -> tuple[int, int | None]:
    """Searches the largest batch whose program fits into memory.

    Memory grows with the batch along a line, nearly: where the line through the last two attempts, fitting or not,
    meets the chip's memory is tried next, then what is left is narrowed down until the smallest batch that does not fit
    is an eighth larger than the largest that does.

    Args:
      config: the experiment.
      first: the plan of its own batch.
      compiles: at most so many more.

    Returns:
      (largest batch that was compiled and fits, 0 if none; smallest that does not, None if none).
    """
    config = _settled(config, first)
    step = first.images // _rows(config, first)
    tried = {first.images // step: first}
    for _ in range(compiles):
        fitting = max((rows for rows, plan in tried.items() if plan.fits), default=0)
        failing = min((rows for rows, plan in tried.items() if not plan.fits), default=None)
        if failing is not None and failing - fitting <= max(1, fitting // 8):
            break
        rows = _guess(tried, fitting, failing)
        tried[rows] = make(with_batch(config, first.name, rows * step), first.name, first.topology, quick=True)
    fitting = max((rows for rows, plan in tried.items() if plan.fits), default=0)
    failing = min((rows for rows, plan in tried.items() if not plan.fits), default=None)
    return fitting * step, failing and failing * step


def _settled(config: ConfigDict, plan: Plan) -> ConfigDict:
    """The config with what was chosen for a plan."""
    if plan.name not in fitting.JOBS:
        return config
    return fitting.applied(config, plan.name, fitting.Choice(plan.accumulation, plan.remat))


def _rows(config: ConfigDict, plan: Plan) -> int:
    """Images of a chip and microbatch."""
    return plan.images // (microbatches_of(config, plan.name) * plan.mesh["data"] * plan.mesh["fsdp"])


def _guess(tried: dict[int, Plan], fitting: int, failing: int | None) -> int:
    """How many images a chip is to be given next, more than `fitting` and fewer than `failing`."""
    last = list(tried.items())[-2:]
    if len(last) == 2:
        (x, a), (y, b) = ((rows, plan.memory) for rows, plan in last)
        limit, slope = last[0][1].topology.chip.memory, (b - a) / (y - x)
        guess = int(x + (limit - a) / slope) if slope > 0 else 2 * fitting
    else:
        guess = 2 * fitting
    if failing is None:
        return min(max(guess, fitting + max(1, fitting // 8)), 8 * fitting)
    return guess if fitting < guess < failing else (fitting + failing) // 2


def _operations(config: ConfigDict, name: str, topology: Topology, mesh: Mesh, **model: str) -> Counter[str]:
    """By precision, counted in the program `name`, with other settings of `config.model`.

    Attention must have its plain form where that is what runs here, or what runs is not traced (cuDNN's kernel).
    """
    changed = config.copy_and_resolve_references()
    changed.model.update({key: value for key, value in model.items() if key in changed.model})
    program = PROGRAMS[name](changed, mesh)
    with jax.set_mesh(mesh), standing_in_for(topology.platform):
        return flops.by_precision(program.function.trace(*program.arguments).jaxpr)


def _taken(compiled: Any, program: Program, topology: Topology, quick: bool) -> dict[str, Any]:
    """Memory, traffic and collectives of a compiled program."""
    held, arguments = held_bytes(program), compiled.memory_analysis().argument_size_in_bytes
    working = fitting.taken(compiled) - arguments
    held["layout"] = max(0, arguments - sum(held.values()))
    module = hlo.parse(compiled.as_text())
    return {
        "held": held,
        "working": working,
        "fits": sum(held.values()) + working <= topology.chip.memory,  # the compiler looks at the latter alone
        "moved": hlo.bytes_moved(module),
        "collectives": hlo.collectives(module),
        **({"cycles": 0, "kernel_cycles": 0} if quick else _cycles(module, topology)),
    }


def _cycles(module: hlo.Module, topology: Topology) -> dict[str, Any]:
    """Those of a compiled program, and a note on kernels that have no formula."""
    if not (others := hlo.estimated_cycles(module)):
        return {"cycles": 0, "kernel_cycles": 0}
    calls = [(kernel, kernels.cycles(kernel, topology.kind)) for kernel in kernels.found(module)]
    own = round(sum(kernel.times * (cycles or 0) for kernel, cycles in calls) / topology.chip.cores)
    unknown = sorted({kernel.name for kernel, cycles in calls if cycles is None})
    notes = (f"The cost model counts no cycle of {', '.join(unknown)}.",) if unknown else ()
    return {"cycles": others + own, "kernel_cycles": own, "notes": notes}


def _overflow(compiled: Compiled) -> dict[str, Any]:
    """What is known of a program that does not fit; raises the compiler's error if that does not say what it needs."""
    if math.isinf(compiled.needed):
        raise compiled.error
    working = int(compiled.needed) - sum(held_bytes(compiled.program).values())
    return {"working": working, "fits": False, "moved": None, "collectives": [], "cycles": 0, "kernel_cycles": 0}
