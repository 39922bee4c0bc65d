"""Time of one reAR training step against its FLOP floor and against PyTorch.

python benchmarks/train_step.py [--torch-python=PYTHON] [--dropout=0.1] [--profile=DIR]
python benchmarks/train_step.py --width=768 --layers=24 --heads=16 --batch=128 --dtype=bfloat16 --unroll=1  # reAR-B
python benchmarks/train_step.py --width=1024 --layers=24 --heads=16 --batch=64 --dtype=bfloat16 --unroll=1  # reAR-L

With --compile-only nothing is allocated or run, so that any size does; processor time stands beside wall time.
"""

import argparse
import os
import time

import jax
import jax.numpy as jnp
import measure

from rear_jax.models.stack import REMAT
from rear_jax.training import next_code
from rear_jax.training.state import adamw, new_state


def matmul_flops(width: int, layers: int, codes: int, codebook: int, batch: int) -> float:
    """FLOPs of the matrix products of one step, three times those of a forward pass; 2 per multiply-add.

    Per position and layer: attention 4W², MLP 8W², modulation 6W²; scores and mixing 2·2·T·W (uncausal, as computed);
    per code: head K·W + 2W², and both projectors W·2048 + 2048² + 2048·D.
    """
    positions = codes + 2
    blocks = layers * positions * (18 * width**2 + 2 * positions * width)
    projectors = 2 * (width * 2048 + 2048**2 + 2048 * measure.EMBEDDING_DIM)
    return 3 * 2 * batch * (blocks + codes * (codebook * width + 2 * width**2 + projectors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--remat", default="none", choices=REMAT)
    parser.add_argument("--unroll", type=int, default=0, help="layers compiled side by side; 0 = all")
    parser.add_argument("--compile-only", action="store_true", help="print how long the step takes to compile")
    parser.add_argument("--profile", default="", help="write a profiler trace of one step here")
    arguments = parser.parse_args()
    config, model = measure.build(arguments, dropout=arguments.dropout, remat=arguments.remat, unroll=arguments.unroll)
    optimizer = adamw(config.train.optimizer, 1000)

    @jax.jit
    def inputs():
        example = jnp.zeros((1, model.num_codes), jnp.int32), jnp.zeros(1, jnp.int32)
        state = new_state(model.init(jax.random.key(0), *example)["params"], optimizer)
        key = jax.random.key(1)
        codes = jax.random.randint(key, (arguments.batch, arguments.codes), 0, arguments.codebook)
        batch = {"codes": codes, "label": jnp.arange(arguments.batch) % arguments.classes}
        return state, batch, key, {"codebook": jax.random.normal(key, (arguments.codebook, measure.EMBEDDING_DIM))}

    step = jax.jit(next_code.train_step(model, config, optimizer), donate_argnums=0)
    since, processor = time.perf_counter(), time.process_time()
    step = step.lower(*jax.eval_shape(inputs)).compile()
    compile_seconds, processor = time.perf_counter() - since, time.process_time() - processor
    if arguments.compile_only:
        temporary = step.memory_analysis().temp_size_in_bytes / 2**30
        print(f"compiled in {compile_seconds:.1f} s, {processor:.1f} s of processor time")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {temporary:.1f} GiB besides the inputs")
        return

    state, batch, key, frozen = inputs()
    before = measure.matmul_ceiling(arguments.dtype)
    first = state
    seconds, (state, _) = measure.timed(
        step, lambda last: (first if last is None else last[0], batch, key, frozen), arguments.repeats
    )
    ceiling = max(before, measure.matmul_ceiling(arguments.dtype))
    if arguments.profile:
        with jax.profiler.trace(arguments.profile):
            jax.block_until_ready(step(state, batch, key, frozen))

    flops = matmul_flops(arguments.width, arguments.layers, arguments.codes, arguments.codebook, arguments.batch)
    measure.header(ceiling, arguments.dtype)
    rows = [("what", "seconds, median (min to max)", "images/s", "share of its ceiling", "compile s", "peak GiB")]
    rows.append(("floor: all products at the ceiling", f"{flops / ceiling:.3f}", "", "100 %", "", ""))
    best = min(seconds)
    share = f"{100 * flops / best / ceiling:.0f} %"
    memory = f"{measure.peak_memory_gib():.1f}"
    rate = f"{arguments.batch / best:.2f}"
    rows.append(("rear_jax", measure.about(seconds), rate, share, f"{compile_seconds:.1f}", memory))
    if other := measure.pytorch(arguments, "train", f"--dropout={arguments.dropout}"):
        theirs = other["seconds"]["all"]
        own = (
            f"{100 * flops / min(theirs) / 1e9 / other['matmul_gflops']:.0f} % of {other['matmul_gflops']:.0f} GFLOP/s"
        )
        memory = f"{other['peak_rss_mb'] / 1024:.1f}"
        rate = f"{arguments.batch / min(theirs):.2f}"
        rows.append((f"PyTorch {other['torch']}", measure.about(theirs), rate, own, "", memory))
    measure.table(rows)
    print(f"\n{flops / 1e9:.0f} GFLOP in matrix products; rates and shares are of the fastest run")


if __name__ == "__main__":
    main()
