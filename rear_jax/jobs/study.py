"""`--job=study`: an experiment in variants and over seeds, as one table and one picture of curves."""

import json
import logging
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files, whatever display there is

import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, jobs, report
from rear_jax.atomic import atomic_file
from rear_jax.errors import RearError
from rear_jax.jobs.evaluate import SAMPLES
from rear_jax.training.writer import read_metrics

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs `config.study.jobs` for each seed and, from what they leave, `variant_jobs` for each variant.

    The tokenizer and the codes are those of `workdir`, the generator that of `workdir/seed_<n>`; a variant works in
    `workdir/seed_<n>/<variant>`. Whatever is done already is not done again. Leaves `study.md` (a row for each variant:
    mean ± standard deviation over seeds of its samples' scores and of its last logged metrics), `study.png` and
    `study.json`.
    """
    study = config.study
    if len(study.seeds) < 2 or not study.variants:
        raise RearError("config.study needs seeds, 2 or more, and variants.")
    results = {name: [] for name in study.variants}
    for seed in study.seeds:
        base = _seeded(config, workdir, seed)
        folder = workdir / f"seed_{seed}"
        for job in study.jobs:
            jobs.JOBS[job](base, folder)
        for name, changes in study.variants.items():
            log.info("study: seed %d, variant %s", seed, name)
            variant = base.copy_and_resolve_references()
            variant.update(changes)
            variant.init_from = str(artifacts.generator_folder(folder))
            for job in study.variant_jobs:
                jobs.JOBS[job](variant, folder / name)
            results[name].append(_result(folder / name, study))
    artifacts.write_json(workdir / "study.json", {"results": results, "config": config.to_dict()})
    rows = {name: [run["scores"] | run["metrics"] for run in runs] for name, runs in results.items()}
    with atomic_file(workdir / "study.md") as file:
        file.write_text(table(rows) + "\n")
    _draw_curves(workdir, study)
    log.info("study: wrote %s\n%s", workdir / "study.md", table(rows))


def _seeded(config: ConfigDict, workdir: Path, seed: int) -> ConfigDict:
    """The experiment with another seed, on the tokenizer, the codes and the reference of the whole study."""
    made = config.copy_and_resolve_references()
    made.seed = seed
    made.tokenizer_from = config.tokenizer_from or str(artifacts.tokenizer_folder(workdir))
    made.codes_from = str(artifacts.codes_folder(config, workdir))
    made.evaluate.cache = config.evaluate.cache or str(workdir / "references")
    return made


def _result(folder: Path, study: ConfigDict) -> dict:
    """Scores of the samples, and the means of the last logged metrics of the training job."""
    scores = json.loads((folder / "scores.json").read_text())["scores"][SAMPLES]
    records = read_metrics(folder, study.variant_jobs[0])[-study.last :]
    names = [name for name in report.CURVES[study.variant_jobs[0]] if name in records[-1]]
    return {"scores": scores, "metrics": {name: statistics.fmean(r[name] for r in records) for name in names}}


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: a row for each variant, a column for each value, mean ± standard deviation over its runs."""
    columns = list(next(iter(rows.values()))[0])
    lines = [f"| variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, runs in rows.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            cells.append(f"{statistics.fmean(values):.4g} ± {statistics.stdev(values):.2g}")
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw_curves(workdir: Path, study: ConfigDict) -> None:
    """A panel for each metric, a line for each variant: the mean over seeds, the band their range."""
    job = study.variant_jobs[0]
    records = {
        name: [read_metrics(workdir / f"seed_{seed}" / name, job) for seed in study.seeds] for name in study.variants
    }
    some = next(iter(records.values()))[0]
    names = [name for name in report.CURVES[job] if name in some[-1]]
    figure, panels = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.0), layout="constrained", squeeze=False)
    for panel, metric in zip(panels[0], names, strict=True):
        for variant, runs in records.items():
            steps = [record["step"] for record in runs[0]]
            values = np.array([[record[metric] for record in run] for run in runs])  # [seeds, logged steps]
            (line,) = panel.plot(steps, values.mean(axis=0), label=variant.replace("_", " "))
            panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
        panel.set_title(metric.replace("_", " "), fontsize=10)
        panel.set_xlabel(f"{job} step", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    with atomic_file(workdir / "study.png") as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)
