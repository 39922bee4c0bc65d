"""`report.md` and `report.html`: the run on one page. It has curves, pictures, and scores beside their recipe."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rear_jax.errors import one_line
from rear_jax.runtime.figures import finish_panel, new_figure, save_figure, table
from rear_jax.runtime.pages import save_page
from rear_jax.runtime.writer import read_metrics

CURVES = {  # job -> metrics that are drawn, one panel each
    "tokenizer": ("mse", "perceptual", "perplexity", "codebook_usage"),
    "train": ("cross_entropy", "correct_codes", "shallow", "deep", "noise", "random_share", "gradient_norm"),
    "posttrain": ("reward", "reward_spread", "prior", "entropy", "kl", "ratio", "clip_share", "gradient_norm"),
}
PICTURES = {
    "samples.png": "Samples, by class or by prompt",
    "posttrain.png": "Post-training: held-out images, their reconstructions, and samples for them",
    "reconstructions.png": "Held-out images and, below, what the tokenizer makes of them",
}


def write(workdir: Path, result: dict) -> None:
    """Writes `report.md`, `report.html` and `curves_<job>.png`: `metrics.jsonl` and the scores of `--job=evaluate`."""
    lines = [*_scores(result), ""]
    for name, caption in PICTURES.items():
        if (workdir / name).exists():
            lines += [f"## {caption}", "", f"![{caption}]({name})", ""]
    for job, names in CURVES.items():
        records = read_metrics(workdir, job)
        if records:
            _draw_curves(workdir / f"curves_{job}.png", job, records, names)
            lines += [f"## Training curves: {job}", "", f"![{job}](curves_{job}.png)", "", *_last(records, names), ""]
    lines += ["## Recipe of the score", "", *recipe_lines(result["recipe"]), ""]
    save_page(workdir / "report.md", "Report", "\n".join(lines))


def text_table(result: dict) -> str:
    """The scores for a terminal: a line for each, a column for each set of images."""
    sets = result["scores"]
    names = list(dict.fromkeys(name for values in sets.values() for name in values))
    rows = [["", *sets], *([name, *(_cell(values.get(name)) for values in sets.values())] for name in names)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def recipe_lines(recipe: dict) -> list[str]:
    """A Markdown list, a line for each entry; those of nested recipes under both names."""
    return [f"- {key}: {one_line(str(value))}" for key, value in _flat(recipe)]


def common(recipes: Sequence[dict]) -> dict:
    """The entries that all of several recipes agree on, in nested ones too."""
    found = {}
    for key, value in recipes[0].items():
        values = [recipe.get(key) for recipe in recipes]
        if all(isinstance(value, dict) for value in values):
            found[key] = common(values)
        elif all(other == value for other in values):
            found[key] = value
    return found


def _scores(result: dict) -> list[str]:
    """One table: a row per set of images."""
    columns = list(dict.fromkeys(column for values in result["scores"].values() for column in values))
    rows = [
        [name, *(f"{values[column]:.3f}" if column in values else "" for column in columns)]
        for name, values in result["scores"].items()
    ]
    return [table(["images", *columns], rows), "", _meaning(columns, result["recipe"])]


def _meaning(columns: list[str], recipe: dict) -> str:
    """What the distance is, and whether it compares with published ones."""
    lower = "lower is better, and the floor is what real images score."
    if "FID" not in columns and "rFID" not in columns:
        return (
            f"{columns[0]} is a Fréchet distance on the named network's features: {lower} "
            "It is not FID and compares with no published one."
        )
    if recipe["comparable_with_published_FID"]:
        return f"FID is by the protocol of ADM's evaluator: {lower} The samples' compares with published ones."
    reasons = "; ".join(recipe["not_comparable_because"])
    return f"FID is on Inception's features: {lower} It compares with no published one: {reasons}."


def _last(records: list[dict], names: tuple[str, ...]) -> list[str]:
    """The final values in words."""
    last = records[-1]
    values = ", ".join(f"{name} {last[name]:.4g}" for name in names if name in last)
    speed = f"; {last['images_per_second']:.0f} images/s" if "images_per_second" in last else ""
    return [f"Step {last['step']}: {values}{speed}."]


def _draw_curves(path: Path, job: str, records: list[dict], names: tuple[str, ...]) -> None:
    """One panel per metric against the step."""
    names = tuple(name for name in names if name in records[-1])
    figure, panels = new_figure(1, len(names), 3.2, 2.6)
    for panel, name in zip(panels, names, strict=True):
        panel.plot([r["step"] for r in records], [r.get(name, np.nan) for r in records])
        finish_panel(panel, name, f"{job} step")
    save_figure(path, figure)


def _flat(recipe: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Nested recipe as lines."""
    lines = []
    for key, value in recipe.items():
        lines += _flat(value, f"{key}: ") if isinstance(value, dict) else [(prefix + key, value)]
    return lines
