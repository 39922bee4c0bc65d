"""Self-consistency: do codes come back when the images that they decode to are encoded again?

A tokenizer gives few of its codes back exactly. Of the codes of real images it gives a certain share back; of codes
that a generator has drawn it gives back fewer where these are no codes that it would use together. The difference of
the two shares is one number for the gap between generator and tokenizer.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rear_jax.evaluation.diagnostics import plots
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row, chosen_split
from rear_jax.evaluation.diagnostics.exposure import DRAWS, compile_forced
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject

REAL, DRAWN, GAP = "codes of real images", "drawn codes", "gap"
PARTS = 8  # of a sequence, that have a row each


def measure(subject: Subject, quality: Quality | None) -> list[Row]:
    """A row for whole sequences, and one for each part of them; the drawn ones have the conditions of the real ones."""
    (split,) = chosen_split(subject.config)
    pictures = subject.pictures(split)
    keys = np.asarray(jax.random.key_data(subject.keys(DRAWS, len(pictures.codes))))
    nothing = np.zeros(pictures.codes.shape, bool)
    drawn = subject.over("consistency, drawing", compile_forced(subject), pictures, mask=nothing, keys=keys)
    decoded = subject.decode("consistency, decoding", pictures, pictures.codes)
    back = {
        REAL: subject.encode("consistency, real codes", decoded) == pictures.codes,
        DRAWN: subject.encode("consistency, drawn codes", drawn["images"]) == drawn["codes"],
    }  # [n, N] each
    return [_row("all", back, slice(None)), *_parts(back, subject.num_codes)]


def _parts(back: dict[str, np.ndarray], num_codes: int) -> list[Row]:
    bounds = np.linspace(0, num_codes, min(PARTS, num_codes) + 1).astype(int).tolist()
    return [_row(f"{a + 1} to {b}", back, slice(a, b)) for a, b in itertools.pairwise(bounds)]


def _row(name: str, back: dict[str, np.ndarray], part: slice) -> Row:
    shares = {which: float(same[:, part].mean()) for which, same in back.items()}
    return {"codes": name, **shares, GAP: shares[REAL] - shares[DRAWN]}


def _draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """The parts of the sequence, and the gap of the whole in the title."""
    whole, *parts = rows
    long = [
        {
            "code": int(part["codes"].split()[-1]),
            "of": f"{name}, {whole[name]:.3f}",
            "share that comes back": part[name],
        }
        for name in (REAL, DRAWN)
        for part in parts
    ]
    shown = f"{title.partition(':')[0]}: gap {whole[GAP]:.3f}"
    plots.lines(path, shown, long, along="code", label="up to this code of the sequence", by="of")


DIAGNOSTIC = Diagnostic(
    name="consistency",
    title="Self-consistency: codes that come back when their images are encoded again",
    meaning="Gap: the share of codes of real images that come back, less that of drawn codes.",
    splits=chosen_split,
    reads=(),
    draws=True,
    scores=False,
    measure=measure,
    draw=_draw,
)
