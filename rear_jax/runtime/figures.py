"""Plots in files, whatever display there is, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rear_jax.runtime.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels of so many inches each; the panels row by row."""
    from matplotlib.figure import Figure  # here, because importing it takes time that other jobs need not wait

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def finish_panel(panel: Axes, title: str, x_label: str) -> None:
    """Names a panel and its horizontal axis, and draws a grid."""
    panel.set_title(title.replace("_", " "), fontsize=10)
    panel.set_xlabel(x_label, fontsize=8)
    panel.grid(alpha=0.3)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG under a temporary name and renames it."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=100, format="png")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
