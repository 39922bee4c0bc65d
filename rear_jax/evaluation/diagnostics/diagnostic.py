"""The record of a diagnostic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject

Row = dict[str, str | float | None]  # column -> value, None where there is none


@dataclass(frozen=True)
class Diagnostic:
    """One question to a generator and its tokenizer.

    Attributes:
      name: in `config.analyze.diagnostics`.
      title: of its table and plot.
      meaning: a sentence or two on what its columns are.
      splits: (config) -> the splits that it looks at, keys of `subject.SPLITS`.
      reads: keys of `config.analyze` that it depends on, beside `num_images`.
      draws: whether it draws codes, as `config.sample` says.
      scores: whether it asks `Quality` how images differ from their originals.
      measure: (subject, quality or None) -> the rows of its table, all with the same columns.
      draw: (file, title, rows) makes its plot.
    """

    name: str
    title: str
    meaning: str
    splits: Callable[[ConfigDict], Sequence[str]]
    reads: tuple[str, ...]
    draws: bool
    scores: bool
    measure: Callable[[Subject, Quality | None], list[Row]]
    draw: Callable[[Path, str, Sequence[Row]], None]


def chosen_split(config: ConfigDict) -> tuple[str, ...]:
    """The split that `config.analyze.split` names."""
    return (config.analyze.split,)
