"""`--job=sweep`: what guidance is best? A set of samples and its scores for each scale and power."""

import itertools
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.evaluation import report
from rear_jax.jobs import evaluate, sample
from rear_jax.runtime import figures
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.figures import finish_panel, new_figure, save_figure
from rear_jax.runtime.pages import save_page
from rear_jax.sampling.conditions import scored

log = logging.getLogger(__name__)


OTHER_SEED = 1_000_003  # what is added to config.seed for the samples that confirm the best point


def run(config: ConfigDict, workdir: Path) -> None:
    """Samples and scores every point in `workdir/sweep/<scale>_<power>`; what is done already is not done again.

    With `config.sweep.confirm`, the best point gets a second set of samples, from other random numbers, in
    `workdir/sweep/best`. The scores of the first set chose the point and flatter it; those of the second do not.

    Leaves `sweep.md` and `sweep.html` (a row for each point, and what all their recipes agree on), `sweep.png` (scores
    against the scale, a line for each power) and `sweep.json`.
    """
    configs = _points(config)
    points, recipes = zip(*(_scored(point, workdir, _name(point)) for point in configs), strict=True)
    result = {"points": points, "recipe": report.common(recipes), "config": config.to_dict()}
    page = [table(points), ""]
    if config.sweep.confirm:
        best = configs[points.index(_best(points))]
        best.seed = (best.seed + OTHER_SEED) % 2**32  # jax takes 32 bits
        result["confirmed"], _ = _scored(best, workdir, "best")
        page += ["The best point again, with new samples:", "", table([result["confirmed"]]), ""]
    write_json(workdir / "sweep.json", result)
    _draw(workdir / "sweep.png", points)
    picture = ["![Scores against the guidance scale](sweep.png)", ""]
    recipe = ["## Recipe of the scores", "", *report.recipe_lines(result["recipe"])]
    save_page(workdir / "sweep.md", "Sweep", "\n".join([*page, *picture, *recipe]))
    log.info("sweep: wrote %s\n%s", workdir / "sweep.md", "\n".join(page))


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`. One point stands for all: they differ in two numbers that any generator takes."""
    point = _points(config)[0]
    sample.check(point, workdir, before)
    evaluate.check(point, workdir, (*before, "sample"))


def _points(config: ConfigDict) -> list[ConfigDict]:
    """The config of every pair of a scale and a power; raises RearError where the sweep gives neither."""
    scales = tuple(config.sweep.guidance_scale) or (config.sample.guidance_scale,)
    powers = tuple(config.sweep.guidance_power) or (config.sample.guidance_power,)
    if not config.sweep.guidance_scale and not config.sweep.guidance_power:
        raise RearError("a sweep needs points: give --config.sweep.guidance_scale='(1.5, 2.0, 3.0)' or guidance_power.")
    points = []
    for scale, power in itertools.product(scales, powers):
        point = scored(config)
        point.sample.update(guidance_scale=float(scale), guidance_power=float(power))
        point.evaluate.tokenizer = False  # it is the same at every point
        points.append(point)
    return points


def _name(point: ConfigDict) -> str:
    return f"{point.sample.guidance_scale:g}_{point.sample.guidance_power:g}"


def _scored(point: ConfigDict, workdir: Path, name: str) -> tuple[dict[str, float], dict]:
    """Draws and scores samples in `workdir/sweep/<name>`: the point's guidance with its scores, and their recipe."""
    place = workdir / "sweep" / name
    place.mkdir(parents=True, exist_ok=True)
    sample.run(point, workdir, place)
    evaluate.run(point, workdir, place)
    found = json.loads((place / "scores.json").read_text())
    guidance = {key: point.sample[key] for key in ("guidance_scale", "guidance_power")}
    return guidance | found["scores"][evaluate.SAMPLES], found["recipe"]


def _best(points: Sequence[dict[str, float]]) -> dict[str, float]:
    """The point of the smallest distance, which is the first score."""
    return min(points, key=lambda point: list(point.values())[2])


def table(points: Sequence[dict[str, float]]) -> str:
    """A Markdown table, a row for each point; the best of the first score is in bold."""
    columns, best = list(points[0]), _best(points)
    lines = [[f"{point[column]:.4g}" for column in columns] for point in points]
    lines[points.index(best)][2] = f"**{lines[points.index(best)][2]}**"
    return figures.table(columns, lines)


def drawn_scores(points: Sequence[dict[str, float]]) -> list[str]:
    """Names of the scores that are drawn: the Fréchet distance, and the Inception Score or, without one, precision."""
    columns = list(points[0])
    return [columns[2], "IS" if "IS" in columns else "precision"]


def _draw(path: Path, points: Sequence[dict[str, float]]) -> None:
    """A panel for each of `drawn_scores`, a line for each power."""
    names = drawn_scores(points)
    figure, panels = new_figure(1, len(names), 4.0, 3.2)
    for panel, name in zip(panels, names, strict=True):
        for power in dict.fromkeys(point["guidance_power"] for point in points):
            line = sorted((p["guidance_scale"], p[name]) for p in points if p["guidance_power"] == power)
            panel.plot(*zip(*line, strict=True), marker="o", label=f"power {power:g}")
        finish_panel(panel, name, "guidance scale")
    panels[0].legend(fontsize=8)
    save_figure(path, figure)
