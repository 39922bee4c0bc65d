"""What both benchmarks share: the machine's ceiling, timing, and the PyTorch side in a process of its own."""

import json
import pathlib
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rear_jax import models
from rear_jax.config import alitok_generator, default, llamagen, rar

REFERENCE = pathlib.Path(__file__).with_name("torch_reference.py")
EMBEDDING_DIM = 256
NETWORKS = {"rar": rar, "llamagen": llamagen, "alitok": alitok_generator}


def add_flags(parser) -> None:
    """Sizes of the model; the defaults are the small case that two CPU cores manage."""
    for name, value in {"width": 384, "layers": 6, "heads": 6, "codes": 256, "codebook": 1024, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-python", default="", help="a Python with torch: times the PyTorch way beside ours")


def mlp_width(arguments, network: str) -> int:
    """Hidden width of the MLPs: RAR's four times the model's, the others' 8/3 rounded up to a multiple of 256."""
    if network == "rar":
        return 4 * arguments.width
    return -(-(8 * arguments.width // 3) // 256) * 256


def build(
    arguments,
    *,
    network: str = "rar",
    dropout: float = 0.0,
    method: str = "rear",
    remat: str = "none",
    unroll: int = 0,
) -> tuple:
    """(config, model) of the sizes on the command line."""
    config = default()
    config.model = NETWORKS[network]()
    config.model.update(
        width=arguments.width,
        depth=arguments.layers,
        heads=arguments.heads,
        mlp_width=mlp_width(arguments, network),
        dropout=dropout,
        dtype=arguments.dtype,
        remat=remat,
        unroll=unroll or arguments.layers,
    )
    config.method.name = method
    config.tokenizer.codebook_size = arguments.codebook
    config.data.num_classes = arguments.classes
    return config, models.build(config, num_codes=arguments.codes, embedding_dim=EMBEDDING_DIM)


def matmul_ceiling(dtype: str) -> float:
    """FLOP/s of the best of a dozen large matrix products."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    seconds, _ = timed(jax.jit(lambda x: x @ x), lambda _: (x,), 12)
    return 2 * size**3 / min(seconds)


def timed(function: Callable, arguments: Callable[[Any], tuple], repeats: int) -> tuple[list[float], Any]:
    """Seconds of each call after one to warm up; `arguments` makes them from the last result."""
    result = jax.block_until_ready(function(*arguments(None)))
    seconds = []
    for _ in range(repeats):
        since = time.perf_counter()
        result = jax.block_until_ready(function(*arguments(result)))
        seconds.append(time.perf_counter() - since)
    return seconds, result


def peak_memory_gib() -> float:
    """Of the device where it tells, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def pytorch(arguments, what: str, *more: str) -> dict | None:
    """The last line of `torch_reference.py`, or None without --torch-python."""
    if not arguments.torch_python:
        return None
    sizes = [f"--{n}={getattr(arguments, n)}" for n in ("width", "layers", "heads", "codes", "codebook", "batch")]
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    command = [arguments.torch_python, str(REFERENCE), f"--what={what}", *sizes, f"--dtype={arguments.dtype}"]
    command += [f"--device={device}", f"--repeats={arguments.repeats}", *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def table(rows: list[tuple]) -> None:
    """Prints a Markdown table; the first row is its head."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |")
        if i == 0:
            print("|" + "---|" * len(row))


def about(seconds: list[float]) -> str:
    """Median (min to max)."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def header(ceiling: float, dtype: str) -> None:
    """Where and with what this was measured."""
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {jax.device_count()} device(s), {dtype}; ")
    print(f"ceiling: the best large matrix product runs at {ceiling / 1e9:.0f} GFLOP/s\n")
