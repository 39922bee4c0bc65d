"""Plots in files, whatever display there is, and tables in Markdown."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from rear_jax.runtime.atomic import atomic_file


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[plt.Axes]]:
    """A figure with panels of so many inches each; the panels row by row."""
    size = (width * columns, height * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, list(panels.flat)


def finish_panel(panel: plt.Axes, title: str, x_label: str) -> None:
    """Names a panel and its horizontal axis, and draws a grid."""
    panel.set_title(title.replace("_", " "), fontsize=10)
    panel.set_xlabel(x_label, fontsize=8)
    panel.grid(alpha=0.3)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG under a temporary name and renames it; the figure is gone then."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
