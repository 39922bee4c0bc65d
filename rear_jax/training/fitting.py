"""How a training job fits into its devices' memory: in how many microbatches, and what the backward pass recomputes.

A setting of 0, `config.train.accumulation` or `config.posttrain.accumulation`, and `config.model.remat = 'auto'` leave
this open. The job then compiles its program, and compares what it takes with what a device has. In this order:

1. 'none', in the fewest microbatches that fit. A further microbatch costs one more pass over the parameters (with fsdp,
   one more gathering of them); nothing is computed twice. Not on TPUs, where the next is faster: there, to write what
   lies between products and to read it again takes longer than to compute it (benchmarks/TPU.md).
2. 'products', which computes what is between the linear layers and the attention twice; in its plain form, also that.
3. 'full', which computes the whole forward pass twice, a third more work.
4. the last of these in microbatches of fewer than ROWS images a device, which are slow.
5. the last of these in one microbatch, which needs no room for a sum of gradients beside the new ones.

With ROWS = 8 images of 256 codes a microbatch computes 6 FLOPs x 2048 codes for each parameter. It moves some 20 bytes
of it: the parameter, forward and backward, and the sum of gradients. These 600 FLOPs a byte are more than any chip of
`runtime/chips.py` makes in the time that its memory moves a byte (153 for an A100, 240 for v5e, 560 for v6e).

Memory grows along a line, nearly, with the images of a microbatch, so that a few programs tell which one fits.

On CPUs memory is not the limit, but it costs time. XLA takes the working memory of a step from the system anew each
time, and the system clears every page of it. So `--job=train` runs in microbatches of ROWS_OF_CPUS images: they use the
same pages one after another, and more of what they read is still in the caches (benchmarks/RESULTS.md).
"""

import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime import distributed
from rear_jax.runtime.precision import platform
from rear_jax.runtime.sharding import bytes_per_device
from rear_jax.training import loop
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)

GIB = 2**30
PLAIN = {"attention": "plain", "remat": "none"}  # settings of `config.model` whose program says what a step computes
ROWS = 8  # images a device that a microbatch is to have at least
ROWS_OF_CPUS = 4  # the same on CPUs, where one that has as few is fastest
USED = 0.95  # share of a device's memory; the rest is for weights as they are read, the next batch, pictures, gaps
NEAR = 1.1  # a program that is expected to take so much more than there is may fit all the same
REMATS = ("none", "products", "full")  # of `generators.stack.REMAT`, the fastest first
REMATS_OF_TPUS = REMATS[1:]
JOBS = ("train", "posttrain")  # that choose; the name of each is that of its settings
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Choice(NamedTuple):
    """The number of microbatches of a step, and what the backward pass recomputes."""

    accumulation: int
    remat: str

    def __str__(self) -> str:
        return f"accumulation {self.accumulation}, remat {self.remat}"


class Attempt(NamedTuple):
    """Bytes of a device that a compiled program needs, inf if the compiler does not say, and the program."""

    needed: float
    program: Any


def is_open(config: ConfigDict, job: str) -> bool:
    """Whether the config leaves something to be chosen for the job 'train' or 'posttrain'."""
    return not config[job].accumulation or config.model.get("remat") == "auto"


def options(config: ConfigDict, job: str, rows: int) -> list[list[Choice]]:
    """Groups of choices, the best first; in a group from the fewest microbatches to the most.

    Args:
      config: the experiment; what it settles is in every choice.
      job: 'train' or 'posttrain'.
      rows: images of a device in a whole batch.
    """
    remat = config.model.get("remat", "none")
    remats = (remat,) if remat != "auto" else REMATS_OF_TPUS if platform() == "tpu" else REMATS
    if config[job].accumulation:
        return [[Choice(config[job].accumulation, remat)] for remat in remats]
    counts = [count for count in range(1, rows + 1) if rows % count == 0]
    large = [count for count in counts if rows // count >= min(ROWS, rows)]
    groups = [[Choice(count, remat) for count in large] for remat in remats]
    small = [Choice(count, remats[-1]) for count in counts[len(large) :]]
    return [*groups, small] if small else groups


def choose(
    groups: Sequence[Sequence[Choice]], attempt: Callable[[Choice], Attempt], limit: float, fixed: float
) -> tuple[Choice, Attempt]:
    """The first choice that fits, and its program; where none does, the one that was found to need least.

    Args:
      groups: of `options`.
      attempt: compiles a program.
      limit: bytes of a device that a program may take.
      fixed: bytes of a device that every program takes: state and batch.
    """
    tried: dict[Choice, Attempt] = {}
    last = next(choice for group in groups for choice in group if choice.remat == groups[-1][0].remat)
    if fixed > limit:
        groups = [[last]]
    for group in groups:
        failing, fitting = -1, len(group)
        while (index := _guess(group, failing, fitting, tried, limit, fixed)) is not None:
            tried[group[index]] = attempt(group[index])
            if tried[group[index]].needed <= limit:
                fitting = index
            else:
                failing = index
        if fitting < len(group):
            return group[fitting], tried[group[fitting]]
    if last not in tried:
        tried[last] = attempt(last)
    least = min(tried, key=lambda choice: tried[choice].needed)
    return least, tried[least]


def _guess(
    group: Sequence[Choice], failing: int, fitting: int, tried: dict[Choice, Attempt], limit: float, fixed: float
) -> int | None:
    """Which choice of a group to try between one that fails and one that fits; None if there is no hope for any."""
    if fitting - failing == 1:
        return None
    between = range(failing + 1, fitting)
    same = [(1 / c.accumulation, a.needed) for c, a in tried.items() if c.remat == group[0].remat]
    known = [point for point in same if math.isfinite(point[1])][-2:]
    if not known:
        if same:
            return (failing + fitting) // 2
        return between[-1] if tried else 0
    (x, a), (y, b) = known if len(known) == 2 else [(0.0, fixed), *known]
    expected = [a + (b - a) / (y - x) * (1 / group[index].accumulation - x) for index in between]
    hopeful = (index for index, needed in zip(between, expected, strict=True) if needed <= limit)
    if (first := next(hopeful, None)) is not None:
        return first
    none_fits_yet = fitting == len(group)
    return between[-1] if none_fits_yet and expected[-1] <= NEAR * limit else None


def without_limit(config: ConfigDict, job: str, rows: int) -> Choice:
    """The choice where no limit of memory is known: on CPUs for 'train' in small microbatches, else the batch whole.

    Arguments as of `options`.
    """
    choice = options(config, job, rows)[0][0]
    if config[job].accumulation or job != "train" or platform() != "cpu":
        return choice
    counts = (count for count in range(1, rows + 1) if rows % count == 0 and rows // count >= ROWS_OF_CPUS)
    return choice._replace(accumulation=max(counts, default=1))


def applied(config: ConfigDict, job: str, choice: Choice) -> ConfigDict:
    """The config with a choice in it."""
    chosen = config.copy_and_resolve_references()
    chosen[job].accumulation = choice.accumulation
    if "remat" in chosen.model:
        chosen.model.remat = choice.remat
    return chosen


def taken(compiled: Any) -> int:
    """Bytes of a device that a compiled program takes while it runs."""
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    working = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + made + working


def overflow(error: JaxRuntimeError, fixed: int) -> float:
    """Bytes of a device that a program needs that could not be compiled for lack of them; inf if that is not said.

    `fixed` is what its arguments take. Any other error is raised again.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", str(error))
    used = temporaries or re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
    if not used:
        return math.inf
    size = int(float(used[1]) * UNITS[used[2]])
    return fixed + size if temporaries else max(fixed, size)


def memory_limit(mesh: Mesh) -> int | None:
    """Bytes that the smallest device of this process has for programs; None where the backend does not say, as CPUs."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limits = [some["bytes_limit"] for some in stats if "bytes_limit" in some]
    return min(limits, default=None)


def train(config: ConfigDict, learn: Callable[[ConfigDict], loop.Learning], run: loop.Run) -> TrainState:
    """`loop.train` with what the config leaves open chosen, so that the program fits into the devices' memory.

    The choice is part of the record of each checkpoint. Rounding depends on it, and in post-training the random numbers
    do, so a run that goes on takes it again if it fits, and says so if it does not. All processes choose alike. Where
    the backend does not say how much memory it has, nothing is computed twice, see `without_limit`.

    Args:
      config: the experiment.
      learn: what is computed, by the config.
      run: where; its record holds the config.

    Raises RearError: nothing fits, or as `loop.train`.
    """
    learning = learn(config)
    job = learning.job
    run = dataclasses.replace(run, plain=lambda: learn(_plain(config)))
    if not is_open(config, job):
        return loop.train(learning, run)
    loop.agree(job, run)
    earlier, memory = _earlier(config, job, run), min(distributed.every(memory_limit(run.mesh) or 0))
    choice, compiled = earlier or without_limit(config, job, rows_of_device(config, job, run.mesh)), None
    if (run.checkpoints.latest_step() or 0) < learning.settings.steps:
        if memory:
            choice, compiled = _chosen(config, learn, run.mesh, earlier, learning, memory)
        else:
            log.info("%s: %s; no limit of memory is known", job, choice)
    chosen = applied(config, job, choice)
    changed = {name: run.record[name] | chosen[name].to_dict() for name in (job, "model")}
    run = dataclasses.replace(run, record=run.record | changed, compiled=compiled)
    return loop.train(learn(chosen), run)


def _plain(config: ConfigDict) -> ConfigDict:
    """The config of the same computation in its plain form: nothing is computed twice, no kernel hides operations."""
    plain = config.copy_and_resolve_references()
    plain.model.update({key: value for key, value in PLAIN.items() if key in plain.model})
    return plain


def _earlier(config: ConfigDict, job: str, run: loop.Run) -> Choice | None:
    """What the newest checkpoint was trained with, as far as the config leaves it open; None if it cannot be used."""
    if run.checkpoints.latest_step() is None:
        return None
    record = run.checkpoints.record()
    remat = config.model.get("remat", "none")
    earlier = Choice(
        config[job].accumulation or record[job].get("accumulation", 1),
        record["model"].get("remat", "none") if remat == "auto" else remat,
    )
    every = options(config, job, rows_of_device(config, job, run.mesh))
    if earlier.remat in REMATS and earlier.accumulation in {one.accumulation for group in every for one in group}:
        return earlier
    log.warning("%s: the checkpoint's %s does not divide the batch: from now on numbers differ", job, earlier)
    return None


def _chosen(
    config: ConfigDict,
    learn: Callable[[ConfigDict], loop.Learning],
    mesh: Mesh,
    earlier: Choice | None,
    learning: loop.Learning,
    memory: int,
) -> tuple[Choice, Any]:
    """What fits on the devices, and its program; raises RearError if nothing does."""
    job, arguments = learning.job, learning.arguments(mesh)
    fixed = bytes_per_device(arguments, jax.tree.map(lambda leaf: leaf.sharding, arguments))

    def attempt(choice: Choice) -> Attempt:
        try:
            compiled = loop.compiled_step(learn(applied(config, job, choice)), mesh)
            needed = taken(compiled)
        except JaxRuntimeError as error:
            compiled, needed = None, overflow(error, fixed)
        largest = max(distributed.every(int(min(needed, sys.maxsize))))
        needed = largest if largest < sys.maxsize else math.inf
        log.info("%s: %s would take %.1f of %.1f GiB", job, choice, needed / GIB, memory / GIB)
        return Attempt(needed, compiled)

    since, limit = time.perf_counter(), USED * memory
    groups = options(config, job, rows_of_device(config, job, mesh))
    choice, found = choose([[earlier]] if earlier else groups, attempt, limit, fixed)
    if earlier and found.needed > limit:
        log.warning("%s: the checkpoint's %s does not fit here: from now on numbers differ", job, earlier)
        choice, found = choose(groups, attempt, limit, fixed)
    if found.needed > limit:
        raise RearError(
            f"{job}: a device needs {found.needed / GIB:.1f} GiB with {choice}, and a program may take "
            f"{limit / GIB:.1f} of its {memory / GIB:.1f}: divide the state with config.mesh.fsdp, take more devices, "
            f"or a smaller config.{job}.loop.batch_size."
        )
    seconds = time.perf_counter() - since
    log.info("%s: %s: %.1f of %.1f GiB; %.0f s", job, choice, found.needed / GIB, memory / GIB, seconds)
    return choice, found.program


def rows_of_device(config: ConfigDict, job: str, mesh: Mesh) -> int:
    """Images of a device in a whole batch."""
    return config[job].loop.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
