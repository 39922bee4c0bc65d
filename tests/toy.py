"""The quickstart at toy size: seconds instead of minutes, the same code."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp

from rear_jax import jobs, tokenizers
from rear_jax.config import llamagen
from rear_jax.training.objectives import build_generator

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = pathlib.Path(__file__).with_name("toy_config.py")


def config(**changes):
    """`tests/toy_config.py` with settings changed by dotted name (dots written as double underscores)."""
    from tests.toy_config import get_config

    made = get_config()
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        section = made
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return made


def llamagen_config(**model):
    """The toy experiment with a LlamaGen generator; keywords are settings of its model section."""
    made = config()
    made.unlock()
    made.model = llamagen()
    made.model.update({"width": 16, "depth": 2, "heads": 2, "mlp_width": 32, "dtype": "float32"} | model)
    made.method.name = "ar"
    return made


def tokenizer(made):
    """The tokenizer of a config, without parameters."""
    return tokenizers.build(made.tokenizer, made.data.image_size)


def generator(made):
    """The generator of a config with what its method needs, without parameters."""
    return build_generator(made, tokenizer(made))


def only_sizes(num_codes: int, *, grid: tuple[int, int]) -> types.SimpleNamespace:
    """All that a generator asks of a tokenizer, for numbers of codes that no toy tokenizer gives."""
    return types.SimpleNamespace(codebook_size=16, codes_per_image=num_codes, embedding_dim=4, grid=grid)


def run(workdir: pathlib.Path, *names: str, **changes) -> None:
    """Runs jobs in this process."""
    for name in names:
        jobs.JOBS[name].run(config(**changes), workdir)


def shrink(made):
    """Any config at toy width: the same method and options, on the embedded images."""
    small = config()
    made.tokenizer = small.tokenizer
    for section in ("data", "codes", "evaluate"):
        made[section].update(small[section])
    for key in ("width", "depth", "heads", "mlp_width", "dtype", "unroll"):
        made.model[key] = small.model[key]
    if "prefix_tokens" in made.model:
        made.model.prefix_tokens = 7  # and 3 x 3 of the toy tokenizer's 16 codes
    made.method.update({k: small.method[k] for k in ("shallow_layer", "deep_layer", "projector_width")})
    made.train.loop.update(small.train.loop)
    made.train.optimizer.warmup_steps = 2
    made.sample.update({k: small.sample[k] for k in ("num_images", "batch_size")})
    return made


def saved_state(folder: pathlib.Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint in a folder, on the host whatever devices it came from."""
    newest = max((step for step in folder.iterdir() if step.name.isdigit()), key=lambda step: int(step.name))
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata((newest / "state").resolve()).item_metadata.tree
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return jax.tree.leaves(reader.restore((newest / "state").resolve(), restore_args=on_host))


def command(workdir, *flags: str, config: pathlib.Path = CONFIG) -> list[str]:
    """The command line of the toy experiment, or of another config file."""
    return [sys.executable, "-m", "rear_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]


def environment(devices: int = 1) -> dict[str, str]:
    """For subprocesses: the repository on the path, and so many CPU devices.

    They keep no small programs, as one that is killed while it writes leaves a part of a file."""
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    kept = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | kept


def start(workdir, *flags: str, devices: int = 1) -> subprocess.Popen:
    """Starts the toy experiment in a process of its own."""
    return subprocess.Popen(
        command(workdir, *flags), env=environment(devices), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(workdir, *flags: str, devices: int = 1, config: pathlib.Path = CONFIG) -> subprocess.CompletedProcess:
    """Runs the toy experiment, or another one, in a process of its own to its end."""
    line, variables = command(workdir, *flags, config=config), environment(devices)
    return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=300, check=False)
