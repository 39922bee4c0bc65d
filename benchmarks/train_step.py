"""Time of one training step, as `--job=train` compiles it, against its FLOPs and against PyTorch.

python benchmarks/train_step.py [--torch-python=PYTHON] [--dropout=0.1] [--profile=DIR]
python benchmarks/train_step.py --config=configs/rear_b.py --batch=32 --doublings=4    # one chip's best batch: reAR-B
python benchmarks/train_step.py --config=configs/rear_l.py --batch=32 --doublings=4 --remat=products    # reAR-L
python benchmarks/train_step.py --config=configs/llamagen_xl.py --batch=16 --doublings=4    # LlamaGen-XL
python benchmarks/train_step.py --model=llamagen --codebook=16384 --dropout=0.1    # small

A config brings its dropout, 0.1 in all of these; sizes alone have none unless asked. FLOPs are those of matrix products
as `--job=plan` counts them: without what remat computes again, causal attention whole. With --compile-only nothing is
allocated or run, so that any size does; processor time stands beside wall time.
"""

import argparse
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import measure
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.generators.attention_kernels import KERNELS
from rear_jax.generators.stack import REMAT
from rear_jax.plan import programs
from rear_jax.runtime import flops
from rear_jax.runtime.mesh import make_mesh
from rear_jax.training import fitting, objectives
from rear_jax.training.state import TrainState

HEAD = ("what", "seconds, median (min to max)", "floor", "images/s", "MFU", "compile s", "peak GiB")


class Times(NamedTuple):
    """Seconds of each step and of compiling, and the most memory so far."""

    steps: list[float]
    compiling: float
    peak_gib: float


def config_of(arguments) -> ConfigDict:
    """The experiment that the command line asks for."""
    asked = {"dropout": arguments.dropout, "remat": arguments.remat, "attention": arguments.attention}
    settings = {name: value for name, value in asked.items() if value is not None}
    if arguments.config:
        config = measure.read_config(arguments.config)
        config.model.update(settings)
    else:
        method = "rear" if arguments.model == "rar" else "ar"
        config = measure.make_config(arguments, network=arguments.model, method=method, **settings)
    config.train.accumulation = arguments.accumulation or config.train.accumulation
    return config


def with_batch(config: ConfigDict, batch: int, **model: str) -> ConfigDict:
    """The config with another batch, and with other settings of its model."""
    changed = config.copy_and_resolve_references()
    changed.train.loop.batch_size = batch
    changed.model.update(model)
    return changed


def as_run(config: ConfigDict, mesh: Mesh) -> ConfigDict:
    """The config in the microbatches that the job chooses where no limit of memory is known, as on CPUs."""
    if fitting.memory_limit(mesh) is not None or not fitting.is_open(config, "train"):
        return config
    rows = fitting.rows_of_device(config, "train", mesh)
    return fitting.applied(config, "train", fitting.without_limit(config, "train", rows))


def step_flops(config: ConfigDict, batch: int, mesh: Mesh) -> int:
    """FLOPs of a step by its mathematics."""
    program = programs.train(with_batch(config, batch, remat="none", attention="plain"), mesh)
    return flops.count(program.function.trace(*program.arguments).jaxpr)


def first_state(config: ConfigDict, mesh: Mesh) -> Callable[[], TrainState]:
    """A compiled function that makes the state before the first step; the batch does not matter to it."""
    learning = objectives.learning(config, artifacts.outline_tokenizer(config), {})
    places = jax.tree.map(lambda leaf: leaf.sharding, learning.state(mesh))
    return jax.jit(lambda: learning.init({}), out_shardings=places)


def random_inputs(program: programs.Program, codebook: int, classes: int) -> tuple[Any, Any]:
    """Codes with labels, and the codebook that embedding terms look at."""
    _, batch, _, frozen = program.arguments
    key = jax.random.key(1)
    codes = jax.random.randint(key, batch["codes"].shape, 0, codebook)
    labels = jnp.arange(len(codes)) % classes
    made = {"codes": codes, "label": labels}, {"codebook": jax.random.normal(key, frozen["codebook"].shape)}
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), made, (batch, frozen))


def compiled(program: programs.Program) -> tuple[Any, float, float]:
    """The step, and the seconds of wall and of processor time that compiling it took."""
    since, processor = time.perf_counter(), time.process_time()
    step = program.function.lower(*program.arguments).compile()
    return step, time.perf_counter() - since, time.process_time() - processor


def time_step(arguments, config: ConfigDict, init: Callable[[], TrainState], mesh: Mesh, folder: str) -> Times:
    """Runs the step of the config's batch a few times, and once more under the profiler if a folder is given."""
    program = programs.train(as_run(config, mesh), mesh)
    step, compiling, _ = compiled(program)
    batch, frozen = random_inputs(program, config.tokenizer.codebook_size, config.data.num_classes)
    first = init()
    seconds, (state, *_) = measure.timed(
        step, lambda last: (first if last is None else last[0], batch, None, frozen), arguments.repeats
    )
    if folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(step(state, batch, None, frozen))
    return Times(seconds, compiling, measure.peak_memory_gib())


def rows(
    arguments, config: ConfigDict, mesh: Mesh, ceiling: float, peak: measure.Peak, rates: dict[int, float]
) -> Iterator[tuple]:
    """The table: one row a batch, doubled until memory is full, then PyTorch's; `rates` gets images/s by batch."""
    yield HEAD
    init = first_state(config, mesh)
    for batch in (arguments.batch << doubled for doubled in range(arguments.doublings + 1)):
        count = step_flops(config, batch, mesh)
        folder = arguments.profile and f"{arguments.profile}/{batch}"
        changed = with_batch(config, batch)
        times, failure = measure.guarded(lambda c=changed, f=folder: time_step(arguments, c, init, mesh, f))
        if failure:
            yield f"rear_jax, batch {batch}", failure, f"{count / ceiling:.3f}", "", "", "", ""
            break
        best = min(times.steps)
        rates[batch] = batch / best
        yield (
            f"rear_jax, batch {batch}",
            measure.about(times.steps),
            f"{count / ceiling:.3f}",
            f"{rates[batch]:.2f}",
            peak.mfu(count, best),
            f"{times.compiling:.1f}",
            f"{times.peak_gib:.1f}",
        )
    if not arguments.config and arguments.model == "rar":
        yield from pytorch_row(arguments, step_flops(config, arguments.batch, mesh))


def pytorch_row(arguments, count: int) -> Iterator[tuple]:
    """The same step in PyTorch, if there is one; its share is of its own ceiling."""
    if other := measure.pytorch(arguments, "train", f"--dropout={arguments.dropout or 0.0}"):
        steps, ceiling = other["seconds"]["all"], 1e9 * other["matmul_gflops"]
        share = f"{100 * count / min(steps) / ceiling:.0f} % of {ceiling / 1e9:.0f} GFLOP/s"
        what, rate = f"PyTorch {other['torch']}, batch {arguments.batch}", f"{arguments.batch / min(steps):.2f}"
        memory = f"{other['peak_rss_mb'] / 1024:.1f}"
        yield what, measure.about(steps), f"{count / ceiling:.3f}", rate, share, "", memory


def compile_only(config: ConfigDict, batch: int, mesh: Mesh) -> None:
    """Says how long the step takes to compile, and what memory it needs."""
    step, wall, processor = compiled(programs.train(with_batch(config, batch), mesh))
    temporary = step.memory_analysis().temp_size_in_bytes / 2**30
    print(f"compiled in {wall:.1f} s, {processor:.1f} s of processor time")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {temporary:.1f} GiB besides the inputs")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.add_argument("--config", default="", help="a file of configs/ in the place of sizes and dtype")
    parser.add_argument("--model", default="rar", choices=["rar", "llamagen"])
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--remat", choices=REMAT)
    parser.add_argument("--attention", choices=KERNELS)
    parser.add_argument("--accumulation", type=int, default=0, help="microbatches; 0 = one, on CPUs what the job takes")
    parser.add_argument("--doublings", type=int, default=0, help="how often the batch is doubled, while it fits")
    parser.add_argument("--compile-only", action="store_true", help="print how long the step takes to compile")
    parser.add_argument("--profile", default="", help="write a profiler trace of a step here, and name its costs")
    arguments = parser.parse_args()
    sizes = (*measure.SIZES, "classes", "dtype", "unroll", "model")
    if arguments.config and (given := [n for n in sizes if getattr(arguments, n) != parser.get_default(n)]):
        parser.error(f"--{given[0]} is what --config says already")
    return arguments


def main() -> None:
    arguments = parse()
    config = config_of(arguments)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        if arguments.compile_only:
            compile_only(config, arguments.batch, mesh)
            return
        ceiling, rates = measure.matmul_ceiling(config.model.dtype), {}
        peak = measure.peak(ceiling, config.model.dtype)
        measure.header(ceiling, config.model.dtype, peak)
        measure.table(rows(arguments, config, mesh, ceiling, peak, rates))
        count = step_flops(config, arguments.batch, mesh) / arguments.batch
    print(f"\n{count / 1e9:.4g} GFLOP an image in matrix products; rates and MFU are of the fastest step; ", end="")
    print("the floor is the seconds of all products at the ceiling")
    if rates:
        best = max(rates, key=rates.get)
        print(f"best: {rates[best]:.2f} images/s, at batch {best}", flush=True)
    if rates and arguments.profile:
        print(f"\nWhere the time of a step of batch {best} went:\n")
        measure.table(measure.costs(pathlib.Path(arguments.profile, str(best))))


if __name__ == "__main__":
    main()
