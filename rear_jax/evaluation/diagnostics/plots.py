"""Plots of the diagnostics' tables."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from rear_jax.evaluation.diagnostics.diagnostic import Row
from rear_jax.runtime.figures import finish_panel, new_figure, save_figure

MOST_COLUMNS = 4  # of panels


def lines(path: Path, title: str, rows: Sequence[Row], *, along: str, label: str, by: str = "") -> None:
    """A panel for each column of numbers, a line for each value of the column `by`.

    Args:
      path: of the PNG.
      title: of the figure.
      rows: of the table.
      along: the column on the horizontal axis.
      label: what that is, for people.
      by: a column of names; '' = one line.
    """
    names = [name for name in rows[0] if name not in (along, by)]
    height = -(-len(names) // MOST_COLUMNS)
    size = (3.4, 2.7) if len(names) > 1 else (5.6, 3.4)
    figure, panels = new_figure(height, -(-len(names) // height), *size)
    figure.suptitle(title, fontsize=11)
    for panel, name in zip(panels, names, strict=False):
        for group in dict.fromkeys(row.get(by) for row in rows):
            points = [(row[along], row[name]) for row in rows if row.get(by) == group and row[name] is not None]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=group)
        if all(isinstance(row[along], int) for row in rows):
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish_panel(panel, name, label)
    for panel in panels[len(names) :]:
        panel.remove()
    if by:
        panels[0].legend(fontsize=8)
    save_figure(path, figure)
