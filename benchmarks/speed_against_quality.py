"""Distance of samples against images a second (reAR, arXiv 2510.04450, figure 2) for small generators on Fashion-MNIST.

PYTHONPATH=. python benchmarks/speed_against_quality.py --workdir=DIR             # what is done is not done again
PYTHONPATH=. python benchmarks/speed_against_quality.py --workdir=DIR --quick     # a few steps: a trial of the script

Each tokenizer of tokenizer_families.py gets two generators of one size, AR and reAR, each trained by --steps on all
images. Distances are those of `--job=evaluate` for 1000 samples at one guidance scale. Images/s are of the sampler of
`--job=sample`, compiled, with the tokenizer's decoder. They are the median of --repeats batches, which the generators
draw in turn. DIR gets speed_against_quality.json and .png. Tokenizers that tokenizer_families.py left there are taken.
"""

import argparse
import json
import logging
import pathlib
import runpy
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import measure
import tokenizer_families as families
from ml_collections import ConfigDict

from rear_jax import jobs
from rear_jax.jobs.evaluate import SAMPLES
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.figures import finish_panel, new_figure, save_figure
from rear_jax.runtime.identity import environment

METHODS = {"ar": ("AR", "none"), "rear": ("reAR", "full")}  # of training -> its name, and how its marks are filled
QUICK = {
    "data.train_split": "test",  # which is smaller
    "tokenizer_training.loop.steps": 4,
    "train.loop.steps": 4,
    "train.optimizer.warmup_steps": 1,
    "train.num_images": 64,
    "sample.num_images": 20,
    "sample.batch_size": 10,
    "evaluate.num_reference": 20,
    "evaluate.kid_subset_size": 0,
}


def make_config(name: str, stage: str, arguments: argparse.Namespace) -> ConfigDict:
    """The experiment with a tokenizer of `families.RUNS`; `stage` is as there, such as ':2', or ''."""
    get_config = runpy.run_path(str(families.CONFIGS / families.RUNS[name][0]))["get_config"]
    config = get_config(stage.removeprefix(":")) if stage else get_config()
    config.train.loop.update(steps=arguments.steps, checkpoint_every=250)
    config.sample.update(stage="train", guidance_scale=arguments.guidance)
    config.evaluate.update(tokenizer=False, reconstructed_reference=True)
    config.evaluate.cache = str(arguments.workdir / "references")
    config.update_from_flattened_dict(QUICK if arguments.quick else {})
    return config


def make_tokenizer(name: str, arguments: argparse.Namespace) -> pathlib.Path:
    """Trains a tokenizer, in as many stages as it has, and encodes the images; its workdir."""
    workdir = arguments.workdir / name.lower()
    *before, (last, _, _) = families.RUNS[name][1]
    config = make_config(name, last, arguments)
    for stage, end, _ in before:
        first = workdir.with_name(workdir.name + end)
        jobs.run_all(("tokenizer",), make_config(name, stage, arguments), first)
        config.tokenizer_training.init_from = str(first / "tokenizer")
    jobs.run_all(("tokenizer", "tokenize"), config, workdir)
    return workdir


def make_generator(name: str, method: str, made: pathlib.Path, arguments: argparse.Namespace) -> tuple[dict, Callable]:
    """Trains a generator on the tokenizer and codes in `made`, and scores its samples.

    Returns:
      What is known of it, and what draws a batch: () -> images a second.
    """
    workdir = arguments.workdir / f"{name.lower()}_{method}"
    config = make_config(name, families.RUNS[name][1][-1][0], arguments)
    config.method.name = method
    config.tokenizer_from, config.codes_from = str(made / "tokenizer"), str(made / "codes")
    jobs.run_all(("train", "sample", "evaluate"), config, workdir)
    scores = json.loads((workdir / "scores.json").read_text())["scores"][SAMPLES]
    codes = json.loads((made / "codes" / "header.json").read_text())["codes_per_image"]
    draw, count = families.sampler(config, workdir)

    def images_per_second() -> float:
        since = time.perf_counter()
        draw()
        return count / (time.perf_counter() - since)

    return {"tokenizer": name, "method": METHODS[method][0], "codes": codes, "scores": scores}, images_per_second


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each generator what is known of it, its rates, and their median."""
    made = {name: make_tokenizer(name, arguments) for name in arguments.tokenizers}
    found = [make_generator(name, method, made[name], arguments) for name in made for method in METHODS]
    for _, images_per_second in found:
        images_per_second()  # compiles
    turns = [[images_per_second() for _, images_per_second in found] for _ in range(arguments.repeats)]
    return [
        row | {"images_per_second": statistics.median(rates), "rates": rates}
        for (row, _), rates in zip(found, zip(*turns, strict=True), strict=True)
    ]


def distance_of(row: dict[str, Any]) -> str:
    """The name of the Fréchet distance among a generator's scores."""
    return next(name for name in row["scores"] if name.startswith(("FID", "FD-")))


def table(rows: list[dict[str, Any]]) -> list[tuple]:
    """The lines of the printed table."""
    name = distance_of(rows[0])
    columns = name, f"{name} from reconstructions", "class_accuracy"
    lines = [("tokenizer", "method", "codes", *columns, "images/s", "slowest to fastest batch")]
    for row in rows:
        rates = row["rates"]
        lines.append(
            (
                *(row[key] for key in ("tokenizer", "method", "codes")),
                *(f"{row['scores'].get(column, float('nan')):.4g}" for column in columns),
                f"{row['images_per_second']:.0f}",
                f"{min(rates):.0f} to {max(rates):.0f}",
            )
        )
    return lines


def draw_plot(path: pathlib.Path, rows: list[dict[str, Any]], title: str) -> None:
    """A mark for each generator: its colour tells the tokenizer, a full one reAR; a line joins those of a tokenizer."""
    figure, (panel,) = new_figure(1, 1, 6.4, 4.6)
    name = distance_of(rows[0])
    for place, tokenizer in enumerate(dict.fromkeys(row["tokenizer"] for row in rows)):
        of_it = [row for row in rows if row["tokenizer"] == tokenizer]
        points = [(row["images_per_second"], row["scores"][name]) for row in of_it]
        panel.plot(*zip(*points, strict=True), color=f"C{place}", linewidth=1, alpha=0.5)
        for row, point in zip(of_it, points, strict=True):
            fill = dict(METHODS.values())[row["method"]]
            label = f"{row['method']}, {tokenizer} ({row['codes']} codes)"
            panel.plot(*point, "o", color=f"C{place}", fillstyle=fill, markersize=9, label=label)
    panel.margins(y=0.15)
    panel.set_xlim(0, 1.1 * max(row["images_per_second"] for row in rows))
    panel.set_ylabel(f"{name}: lower is better", fontsize=8)
    finish_panel(panel, title, "images/s")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    save_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder, for a workdir of each network")
    parser.add_argument("--tokenizers", nargs="+", choices=list(families.RUNS), default=list(families.RUNS))
    parser.add_argument("--steps", type=int, default=1000, help="of each generator")
    parser.add_argument("--guidance", type=float, default=1.5, help="scale, of scores and of rates; 1 = off")
    parser.add_argument("--repeats", type=int, default=9, help="batches that are timed")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    arguments = parser.parse_args()
    arguments.workdir = arguments.workdir.resolve()
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what jobs say, on stderr
    rows = measured(arguments)
    batch = make_config(arguments.tokenizers[0], "", arguments).sample.batch_size
    about = {"batch": batch, "guidance": arguments.guidance, "steps": arguments.steps, "made_with": environment()}
    write_json(arguments.workdir / "speed_against_quality.json", about | {"generators": rows})
    title = f"Batches of {batch} on {jax.device_count()} {jax.default_backend()}, guidance {arguments.guidance:g}"
    draw_plot(arguments.workdir / "speed_against_quality.png", rows, title)
    measure.header(measure.matmul_ceiling("float32"), "float32")
    measure.table(table(rows))


if __name__ == "__main__":
    main()
