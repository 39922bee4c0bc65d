"""Curves of a study: a line for each variant, the mean over its seeds, in a band from the smallest to the largest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rear_jax.evaluation import report, watching
from rear_jax.runtime.figures import finish_panel, new_figure, save_figure
from rear_jax.runtime.writer import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4  # panels in a row
LINE_STYLES = "-", "--", ":", "-."

Runs = Mapping[str, Sequence[Path]]  # name of a variant -> the folders of its runs
Lines = dict[str, tuple[list[int], np.ndarray]]  # name of a variant -> logged steps, and values [runs, steps]


def networks_of(variants: Mapping[str, Mapping]) -> dict[str, str]:
    """Variant -> its network: equal texts for those that change `model` alike."""
    return {name: repr(changes.get("model")) for name, changes in variants.items()}


def styles(variants: Mapping[str, Mapping]) -> dict[str, dict[str, str]]:
    """How the line of each variant is drawn, by the settings that it changes.

    Where networks (`model`) differ, each has a colour; each set of other changes then has a style of line, and no other
    change a solid line. Otherwise, each variant has a colour.
    """
    networks = networks_of(variants)
    others = {name: {k: v for k, v in changes.items() if k != "model"} for name, changes in variants.items()}
    colours = list(dict.fromkeys(networks.values()))
    if len(colours) == 1:
        return {name: {"color": f"C{place}"} for place, name in enumerate(variants)}
    kinds = list(dict.fromkeys(map(repr, sorted(others.values(), key=bool))))  # without changes first
    return {
        name: {
            "color": f"C{colours.index(networks[name])}",
            "linestyle": LINE_STYLES[kinds.index(repr(others[name])) % len(LINE_STYLES)],
        }
        for name in variants
    }


def draw(path: Path, runs: Runs, looks: Mapping[str, dict[str, str]], job: str) -> None:
    """Draws a panel for each metric of a job and, if it is 'train', for each score of samples drawn in training.

    Args:
      path: of the PNG.
      runs: the folders of each variant's runs.
      looks: see `styles`.
      job: a training job.
    """
    known = [(job, name) for name in report.CURVES[job]]
    if job == "train":
        known += [(watching.JOB, name) for name in watched_scores(runs)]
    drawn = [(metric, found) for source, metric in known if (found := lines(runs, source, metric))]
    figure, panels = new_figure(-(-len(drawn) // COLUMNS), min(COLUMNS, len(drawn)), 3.4, 3.0)
    for panel in panels[len(drawn) :]:
        panel.set_axis_off()
    for panel, (metric, found) in zip(panels, drawn, strict=False):
        _plot(panel, found, looks)
        finish_panel(panel, metric, f"{job} step")
    panels[0].legend(fontsize=8)
    save_figure(path, figure)


def draw_distances(path: Path, runs: Runs, looks: Mapping[str, dict[str, str]]) -> None:
    """Draws the Fréchet distances of samples drawn in training against the steps, on logarithmic axes."""
    from matplotlib.ticker import MaxNLocator, NullLocator  # here, as matplotlib is in runtime/figures.py

    names = distances(watched_scores(runs))
    figure, panels = new_figure(1, len(names), 5.6, 4.4)
    for panel, name in zip(panels, names, strict=True):
        _plot(panel, lines(runs, watching.JOB, name), looks, marker="o", markersize=3)
        panel.set_yscale("log")
        panel.yaxis.set(major_locator=MaxNLocator(8), major_formatter="{x:g}", minor_locator=NullLocator())
        finish_panel(panel, name, "train step")
    panels[0].legend(fontsize=8, ncols=-(-len(runs) // 4))
    save_figure(path, figure)


def distances(names: Iterable[str]) -> list[str]:
    """The names of Fréchet distances among those of scores."""
    return [name for name in names if name.startswith(("FID", "FD-"))]


def watched_scores(runs: Runs) -> list[str]:
    """Names of the scores of `config.train.evaluate_every`; none where it is 0."""
    some = read_metrics(next(iter(runs.values()))[0], watching.JOB)
    return [name for name in (some[-1] if some else {}) if name not in ("job", "step")]


def lines(runs: Runs, job: str, metric: str) -> Lines:
    """The line of each variant that has the metric."""
    found = {}
    for name, folders in runs.items():
        records = [read_metrics(folder, job) for folder in folders]
        if records[0] and metric in records[0][-1]:
            values = np.array([[record[metric] for record in run] for run in records])
            found[name] = [record["step"] for record in records[0]], values
    return found


def _plot(panel: Axes, found: Lines, looks: Mapping[str, dict[str, str]], **marks) -> None:
    for variant, (steps, values) in found.items():
        look = looks[variant]
        panel.plot(steps, values.mean(axis=0), label=variant.replace("_", " "), **look, **marks)
        panel.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.2, linewidth=0)
