"""The three small tokenizers on Fashion-MNIST, each with a reAR generator: what their codes cost and give.

python benchmarks/tokenizer_families.py --workdir=DIR    # fifteen minutes on two cores; goes on where it was stopped

The quickstart's grid of codes (without its post-training, which the others do not have), TiTok's codes without a place,
and AliTok's, which are made to be read in order. Scores are those of `--job=evaluate`; images/s is the sampler's with
guidance, one warm batch after another.
"""

import argparse
import functools
import json
import pathlib
import runpy
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import measure
import numpy as np

from rear_jax import artifacts
from rear_jax.jobs.evaluate import DECODED, HELD_OUT, SAMPLES
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import draw
from rear_jax.sampling.conditions import open_conditions
from rear_jax.training import objectives

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
JOBS = "--job=tokenizer,tokenize,train,sample,evaluate"
RUNS = {  # name -> (config, commands that make it, each with the end of its workdir's name)
    "grid": ("quickstart.py", [("", "", [JOBS, "--config.sample.stage=train"])]),
    "TiTok": ("fashion_titok.py", [("", "", [])]),
    "AliTok": (
        "fashion_alitok.py",
        [(":1", "_1", []), (":2", "", ["--config.tokenizer_training.init_from={workdir}_1/tokenizer"])],
    ),
}


def run(name: str, workdir: pathlib.Path) -> float:
    """Runs the commands of a row, as a user would; minutes, of which those of a command that was done count little."""
    config, commands = RUNS[name]
    since = time.perf_counter()
    for stage, end, flags in commands:
        flags = [flag.format(workdir=workdir) for flag in flags]
        program = [sys.executable, "-m", "rear_jax.main", f"--config={CONFIGS / config}{stage}"]
        subprocess.run([*program, f"--workdir={workdir}{end}", *flags], check=True)
    return (time.perf_counter() - since) / 60


def sampler(config, workdir: pathlib.Path) -> tuple[Callable[[], np.ndarray], int]:
    """What draws a guided batch by the program that `--job=sample` runs, compiled by the first call; its images."""
    tokenizer = artifacts.load_tokenizer(config, workdir)
    network = objectives.build_generator(config, tokenizer.module)
    generator = artifacts.load_generator(config, workdir, tokenizer, network, stage="train")
    conditions = open_conditions(config, workdir, generator.module)
    batch = next(draw.plan_batches(conditions.labels, np.arange(len(conditions.labels)), config.sample.batch_size))
    mesh = make_mesh(config.mesh)
    program = draw.compile_sampler(config, generator.module, tokenizer.module)
    with_weights = functools.partial(program, generator.params, tokenizer.params)

    def draw_one() -> np.ndarray:
        with jax.set_mesh(mesh):
            return draw.draw_batch(with_weights, conditions, batch, mesh)

    return draw_one, batch.count


def sampling_rate(config, workdir: pathlib.Path, repeats: int) -> float:
    """Images/s, the best of several batches."""
    draw_one, count = sampler(config, workdir)
    seconds, _ = measure.timed(draw_one, lambda _: (), repeats)
    return count / min(seconds)


def row(name: str, workdir: pathlib.Path, minutes: float, repeats: int) -> tuple:
    """Of the table."""
    config = runpy.run_path(str(CONFIGS / RUNS[name][0]))["get_config"]()
    config.sample.stage = "train"
    scores = json.loads((workdir / "scores.json").read_text())["scores"]
    distance = next(key for key in scores[SAMPLES] if key.startswith("FD"))
    codes = json.loads((workdir / "codes" / "header.json").read_text())["codes_per_image"]
    steps = "+".join([str(config.tokenizer_training.loop.steps)] * len(RUNS[name][1]))
    return (
        name,
        codes,
        steps,
        f"{scores[DECODED]['r' + distance]:.0f}",
        f"{scores[DECODED]['PSNR']:.1f}",
        f"{scores[SAMPLES][distance]:.0f}",
        f"{scores[SAMPLES]['class_accuracy']:.2f}",
        f"{sampling_rate(config, workdir, repeats):.0f}",
        f"{minutes:.1f}",
        f"{scores[HELD_OUT][distance]:.0f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder, for a workdir of each tokenizer")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name in RUNS:
        workdir = arguments.workdir.resolve() / name.lower()
        rows.append(row(name, workdir, run(name, workdir), arguments.repeats))
    measure.header(measure.matmul_ceiling("float32"), "float32")
    head = "tokenizer", "codes", "its steps", "reconstruction FD", "PSNR", "generation FD", "class accuracy"
    measure.table([(*head, "images/s", "minutes", "floor"), *rows])


if __name__ == "__main__":
    main()
