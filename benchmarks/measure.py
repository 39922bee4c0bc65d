"""What the benchmarks share: sizes, ceilings, timing, counting, tables, and the PyTorch side in its own process."""

import gc
import json
import math
import pathlib
import re
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.config import alitok, alitok_generator, default, llamagen, llamagen_vq, maskgit_vqgan, rar
from rear_jax.errors import RearError
from rear_jax.generators.interface import Generator
from rear_jax.runtime import chips, flops
from rear_jax.training import objectives

REFERENCE = pathlib.Path(__file__).with_name("torch_reference.py")
SIZES = {"width": 384, "layers": 6, "heads": 6, "codes": 256, "codebook": 1024}  # what two CPU cores manage
NETWORKS = {"rar": (rar, maskgit_vqgan), "llamagen": (llamagen, llamagen_vq), "alitok": (alitok_generator, alitok)}
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # how XLA's message begins


class Peak(NamedTuple):
    """FLOP/s, of all devices, that utilisation (MFU) is a share of, and where the number is from."""

    flops: float
    source: str

    def mfu(self, operations: float, seconds: float) -> str:
        """Share of it at which so many operations were done, for people."""
        return f"{100 * operations / seconds / self.flops:.1f} %"


def add_flags(parser) -> None:
    """Sizes of the model; the defaults are the small case that two CPU cores manage."""
    for name, value in (SIZES | {"batch": 8}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--unroll", type=int, default=0, help="layers compiled side by side; 0 = all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch-python", default="", help="a Python with torch: times the PyTorch way beside ours")


def mlp_width(arguments, network: str) -> int:
    """Hidden width of the MLPs: RAR's four times the model's, the others' 8/3 rounded up to a multiple of 256."""
    if network == "rar":
        return 4 * arguments.width
    return -(-(8 * arguments.width // 3) // 256) * 256


def make_config(arguments, *, network: str = "rar", method: str = "rear", **model) -> ConfigDict:
    """The experiment of the sizes on the command line, as far as its generator goes.

    Args:
      arguments: of `add_flags`.
      network: of NETWORKS.
      method: of training.
      **model: further settings of `config.model`.
    """
    config = default()
    make_model, make_tokenizer = NETWORKS[network]
    config.model, config.tokenizer = make_model(), make_tokenizer()
    sizes = {
        "width": arguments.width,
        "depth": arguments.layers,
        "heads": arguments.heads,
        "mlp_width": mlp_width(arguments, network),
        "dropout": 0.0,
        "dtype": arguments.dtype,
        "unroll": arguments.unroll or arguments.layers,
    }
    config.model.update(sizes | model)
    config.method.name = method
    config.tokenizer.codebook_size = arguments.codebook
    config.data.num_classes = arguments.classes
    patches = arguments.codes - config.tokenizer.get("prefix_tokens", 0)
    config.data.image_size = 16 * math.isqrt(max(patches, 1))  # every tokenizer here has one code for 16 x 16 pixels
    return config


def build(arguments, **settings) -> tuple[ConfigDict, Generator]:
    """(config, generator) of the sizes on the command line; settings as of `make_config`.

    Raises RearError: no square image has so many codes.
    """
    config = make_config(arguments, **settings)
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    if tokenizer.codes_per_image != arguments.codes:
        raise RearError(f"--codes={arguments.codes}: try {tokenizer.codes_per_image}, which a square image has.")
    return config, objectives.build_generator(config, tokenizer)


def random_params(generator: Generator) -> Any:
    """Parameters of a generator that nobody has trained."""
    inputs = generators.family_of(generator).example_inputs(generator)
    return jax.jit(generator.init)(jax.random.key(0), *inputs)["params"]


def read_config(path: str) -> ConfigDict:
    """The experiment of a file such as configs/rear_b.py."""
    return runpy.run_path(path)["get_config"]()


def chip() -> chips.Chip | None:
    """The published numbers of the devices that are here, if rear_jax/runtime/chips.py has them."""
    return chips.of_kind(jax.devices()[0].device_kind)


def peak(ceiling: float, dtype: str) -> Peak:
    """What MFU is a share of: the chip's published bfloat16 rate, elsewhere the best measured product."""
    published = chip() if dtype == "bfloat16" else None
    if published is None:
        return Peak(ceiling * jax.device_count(), "that ceiling: no published rate is known here")
    return Peak(published.flops * jax.device_count(), f"the published {published.flops / 1e12:.0f} TFLOP/s of a chip")


def operations(function: Callable, *arguments: Any) -> int:
    """FLOPs in matrix products and convolutions, as `--job=plan` counts them; `arguments` may be shapes."""
    return flops.count(jax.jit(function).trace(*arguments).jaxpr)


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


def guarded(work: Callable[[], Any]) -> tuple[Any, str]:
    """(what `work` returns, ''), or (None, why not) where the device could not do it: too little memory, mostly."""
    try:
        return work(), ""
    except JaxRuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        reason = "out of memory" if OUT_OF_MEMORY in str(error) else f"failed: {str(error).splitlines()[0][:100]}"
    gc.collect()  # what the failed attempt still holds
    return None, reason


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


def table(rows: Iterable[tuple]) -> None:
    """Prints a Markdown table, each row as soon as there is one; the first is its head."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
        if i == 0:
            print("|" + "---|" * len(row), flush=True)


def costs(folder: pathlib.Path, count: int = 12) -> list[tuple[str, ...]]:
    """Rows of a table: what took most of the time that `jax.profiler.trace` recorded there, numbered names together."""
    spent = defaultdict(list)
    for file in folder.rglob("*.xplane.pb"):
        for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(file))):
            spent[re.sub(r"[.\d]+$", "", name)].append(nanoseconds)
    total = sum(map(sum, spent.values()))
    largest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:count]
    rows = [(n, len(t), f"{sum(t) / 1e6:.2f}", f"{100 * sum(t) / total:.1f} %") for n, t in largest]
    return [("operation", "calls", "ms", "share of all"), *rows]


def _events(profile: Any) -> Iterable[tuple[str, float]]:
    """Name and duration of what devices did: a GPU's kernels, a TPU's operations; on a CPU those of the program."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            yield from ((e.name, e.duration_ns) for e in line.events if devices or "hlo_op" in dict(e.stats))


def about(seconds: list[float]) -> str:
    """Median (min to max)."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def header(ceiling: float, dtype: str, mfu: Peak | None = None) -> None:
    """Where and with what this was measured, and what MFU is a share of."""
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {jax.device_count()} device(s), {dtype}; ")
    print(f"ceiling: the best large matrix product runs at {ceiling / 1e9:.0f} GFLOP/s")
    print(f"MFU: of {mfu.source}\n" if mfu else "", flush=True)
