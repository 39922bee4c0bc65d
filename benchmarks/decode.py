"""Time of sampling one batch with guidance, against a counted floor and against RAR's cached decoding in PyTorch.

python benchmarks/decode.py [--torch-python=PYTHON] [--segments=4]
python benchmarks/decode.py --width=768 --layers=24 --heads=16 --batch=128 --dtype=bfloat16    # reAR-B
python benchmarks/decode.py --model=llamagen --width=1280 --layers=36 --heads=20 --codebook=16384 --codes=576 \\
    --batch=64 --dtype=bfloat16    # LlamaGen-XL, 384 px
"""

import argparse
import time

import jax
import jax.numpy as jnp
import measure

from rear_jax import decode, models


def floor(arguments, flops_per_s: float, bytes_per_s: float) -> dict[str, float]:
    """Seconds that the arithmetic and the memory traffic take at least.

    Per code and sequence, both halves of the guidance: 4W² multiply-adds a layer in attention's projections, 8W² in
    RAR's MLP or 3MW in LlamaGen's, K·W in the head, 4·T·W in attention over T positions (half the longest on average).
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measure.add_flags(parser)
    parser.add_argument(
        "--model", default="rar", choices=["rar", "llamagen"], help="PyTorch is compared with rar alone"
    )
    parser.add_argument("--segments", type=int, default=4)
    arguments = parser.parse_args()
    _, model = measure.build(arguments, network=arguments.model, method="ar")
    params = jax.jit(model.init)(jax.random.key(0), *models.example_inputs(model))["params"]
    rows = jnp.arange(arguments.batch)
    keys = jax.random.split(jax.random.key(1), arguments.batch)
    sampler = decode.Sampler(guidance_scale=15.0, guidance_power=2.5)
    decoder = models.decoder_of(model)
    classes = rows % arguments.classes

    @jax.jit
    def sample(params, classes, rows, keys):
        return decode.generate(decoder, params, classes, rows, keys, sampler, segments=arguments.segments)

    since = time.perf_counter()
    sample = sample.lower(params, classes, rows, keys).compile()
    compile_seconds = time.perf_counter() - since
    seconds, _ = measure.timed(sample, lambda _: (params, classes, rows, keys), arguments.repeats)
    ceiling, bandwidth = measure.matmul_ceiling(arguments.dtype), memory_bandwidth()
    least = floor(arguments, ceiling, bandwidth)

    measure.header(ceiling, arguments.dtype)
    print(f"memory is read at {bandwidth / 1e9:.1f} GB/s\n")
    table = [("what", "seconds, median (min to max)", "images/s", "times the floor", "compile s", "peak GiB")]
    total = max(least.values())
    for name, value in least.items():
        table.append((f"floor: {name}", f"{value:.3f}", "", f"{value / total:.2f}", "", ""))
    best, memory = min(seconds), f"{measure.peak_memory_gib():.1f}"
    rate = f"{arguments.batch / best:.2f}"
    table.append(("rear_jax", measure.about(seconds), rate, f"{best / total:.2f}", f"{compile_seconds:.1f}", memory))
    for what, label, more in (
        ("decode", "cached, RAR's way", ()),
        ("decode_uncached", "released", ("--steps-limit=8",)),
    ):
        if arguments.model == "rar" and (other := measure.pytorch(arguments, what, *more)):
            theirs, memory = other["seconds"]["all"], f"{other['peak_rss_mb'] / 1024:.1f}"
            rate = f"{arguments.batch / min(theirs):.2f}"
            name = f"PyTorch {other['torch']}, {label}"
            table.append((name, measure.about(theirs), rate, f"{min(theirs) / total:.2f}", "", memory))
            print(f"{label}: {min(theirs) / best:.1f} times as long as rear_jax")
    print()
    measure.table(table)


if __name__ == "__main__":
    main()
