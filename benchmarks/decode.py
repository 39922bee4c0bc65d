"""Time of sampling one batch with guidance: what each part of the cache saves, a counted floor, and PyTorch.

python benchmarks/decode.py [--torch-python=PYTHON] [--segments=4]
python benchmarks/decode.py --width=768 --layers=24 --heads=16 --batch=128 --dtype=bfloat16 --unroll=1    # reAR-B
python benchmarks/decode.py --width=1024 --layers=24 --heads=16 --batch=128 --dtype=bfloat16 --unroll=1    # reAR-L
python benchmarks/decode.py --model=alitok --codes=273 --codebook=4096 --width=768 --layers=24 --heads=16 --batch=128 \\
    --dtype=bfloat16 --unroll=1    # AliTok-B; --batch=256 for each
python benchmarks/decode.py --model=llamagen --width=1280 --layers=36 --heads=20 --codebook=16384 --codes=576 \\
    --batch=64 --dtype=bfloat16 --unroll=1    # LlamaGen-XL, 384 px
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import measure

from rear_jax import generators
from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.interface import Generator
from rear_jax.generators.rar.cached import CachedRAR
from rear_jax.sampling.generate import Sampler, generate

Timed = tuple[list[float], float | None]  # seconds of each run, and of compiling where that was timed
SAMPLER = Sampler(guidance_scale=15.0, guidance_power=2.5)


class ModulatedPerSequence:
    """RAR's own cached way: every step computes the modulation of every sequence anew, from its class and position."""

    def __init__(self, shared: CachedRAR):
        self.shared = shared

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shared, name)

    def condition(self, weights, labels, positions):
        """Classes and position, for each of C positions."""
        return jnp.broadcast_to(labels, (len(positions), len(labels))), positions

    def step(self, weights, conditioning, rows, codes, position, cache):
        """As the shared form's, as if each sequence had a class of its own."""
        labels, at = conditioning
        own = jax.tree.map(lambda leaf: leaf[0], self.shared.condition(weights, labels[rows], at[None]))
        return self.shared.step(weights, own, jnp.arange(len(rows)), codes, position, cache)


def floor(arguments, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
    """Seconds that the arithmetic and the memory traffic take at least.

    Per code and sequence, both halves of the guidance: 4W² multiply-adds a layer in attention's projections, 8W² in
    RAR's MLP or 3MW in the others', K·W in the head, 4·T·W in attention over T positions (half the longest on average).
    RAR's modulation comes on top, once for each class and position. Per step the weights and the past are read once.
    """
    width, layers, codes, batch = arguments.width, arguments.layers, arguments.codes, 2 * arguments.batch
    size = jnp.dtype(arguments.dtype).itemsize
    matrices = 2 if arguments.model == "rar" else 3
    mlp = matrices * width * measure.mlp_width(arguments, arguments.model)
    weights = layers * (4 * width**2 + mlp) + arguments.codebook * width
    past = batch * layers * 2 * width * (codes + 2) / 2
    modulation = (
        (arguments.model == "rar") * 2 * layers * 6 * width**2 * codes * (min(arguments.batch, arguments.classes) + 1)
    )
    flops = codes * batch * 2 * (weights + layers * 2 * width * (codes + 2) / 2) + modulation
    traffic = codes * size * (weights + past)
    return {"arithmetic": flops / flops_per_s, "memory": traffic / bytes_per_s}


def memory_bandwidth() -> float:
    """Bytes/s at which a large array is read and summed."""
    x = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**30, jnp.float32)
    seconds, _ = measure.timed(jax.jit(lambda x: jnp.sum(x * x)), lambda _: (x,), 10)
    return x.nbytes / min(seconds)


def time_sampling(arguments, cached: CachedGenerator | ModulatedPerSequence, params: Any) -> Timed:
    """Seconds of drawing one batch, several times, and seconds of compiling that."""
    rows = jnp.arange(arguments.batch)
    keys = jax.random.split(jax.random.key(1), arguments.batch)
    classes = rows % arguments.classes

    @jax.jit
    def sample(params, classes, rows, keys):
        return generate(cached, params, classes, rows, keys, SAMPLER, segments=arguments.segments)

    since = time.perf_counter()
    program = sample.lower(params, classes, rows, keys).compile()
    compile_seconds = time.perf_counter() - since
    return measure.timed(program, lambda _: (params, classes, rows, keys), arguments.repeats)[0], compile_seconds


def time_uncached(arguments, model: Generator, params: Any) -> list[float]:
    """Seconds without a cache: for each code, the whole network over all positions of both halves; one is timed."""
    codes = jnp.zeros((2 * arguments.batch, model.num_codes), jnp.int32)
    labels = jnp.arange(2 * arguments.batch) % arguments.classes
    forward = jax.jit(lambda params: model.apply({"params": params}, codes, labels).logits)
    seconds, _ = measure.timed(forward, lambda _: (params,), arguments.repeats)
    return [model.num_codes * second for second in seconds]


def ways(arguments, model: Generator, params: Any) -> dict[str, Callable[[], Timed]]:
    """What is to be timed, by name, from the plainest way to the one that rear_jax takes."""
    cached = generators.cached(model)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[arguments.dtype]
    recast = generators.cached(dataclasses.replace(model, dtype=jnp.dtype(other)))
    work = {}
    if not arguments.ours:
        work["no cache (one forward x codes)"] = lambda: (time_uncached(arguments, model, params), None)
    if not arguments.ours and arguments.model == "rar":
        modulated = ModulatedPerSequence(cached)
        work["cache, modulation per sequence"] = lambda: time_sampling(arguments, modulated, params)
    ours = "cache, shared modulation" if arguments.model == "rar" else "cache"
    work[f"rear_jax: {ours}"] = lambda: time_sampling(arguments, cached, params)
    work[f"the same in {other}"] = lambda: time_sampling(arguments, recast, params)
    return work


def rows(arguments, model: Generator, params: Any, least: dict[str, float]) -> Iterator[tuple]:
    """The table: the floor, every way, and PyTorch's."""
    yield "what", "seconds, median (min to max)", "images/s", "times the floor", "times the row before", "compile s"
    total, before = max(least.values()), None
    for name, value in least.items():
        yield f"floor: {name}", f"{value:.3f}", f"{arguments.batch / value:.2f}", f"{value / total:.2f}", "", ""
    for name, work in ways(arguments, model, params).items():
        timed, failure = measure.guarded(work)
        if failure:
            yield name, failure, "", "", "", ""
            before = None
            continue
        seconds, compiling = timed
        best = min(seconds)
        gain = f"{before / best:.2f}" if before else ""
        rate, compiled = f"{arguments.batch / best:.2f}", f"{compiling:.1f}" if compiling else ""
        yield name, measure.about(seconds), rate, f"{best / total:.2f}", gain, compiled
        before = best
    for what, label, more in (
        ("decode", "cached, RAR's way", ()),
        ("decode_uncached", "as released (no cache)", ("--steps-limit=8",)),
    ):
        if arguments.model == "rar" and (other := measure.pytorch(arguments, what, *more)):
            theirs = other["seconds"]["all"]
            rate, name = f"{arguments.batch / min(theirs):.2f}", f"PyTorch {other['torch']}, {label}"
            yield name, measure.about(theirs), rate, f"{min(theirs) / total:.2f}", "", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.add_argument(
        "--model", default="rar", choices=list(measure.NETWORKS), help="PyTorch is compared with rar alone"
    )
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--ours", action="store_true", help="time the ways that rear_jax takes alone")
    arguments = parser.parse_args()
    _, model = measure.build(arguments, network=arguments.model, method="ar")
    params = measure.random_params(model)
    ceiling, bandwidth = measure.matmul_ceiling(arguments.dtype), memory_bandwidth()
    least = floor(arguments, ceiling, bandwidth)
    measure.header(ceiling, arguments.dtype)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s\n")
    measure.table(rows(arguments, model, params, least))
    print(f"\npeak {measure.peak_memory_gib():.1f} GiB over all rows", flush=True)


if __name__ == "__main__":
    main()
