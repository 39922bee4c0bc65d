"""CKA of every layer's hidden states with the codebook's vectors of the current code and of the next one.

reAR (arXiv 2510.04450) finds that a generator's early layers are like the vectors of the code that they read, and later
layers like those of the code that comes next. The examples are the positions that read a code and predict another, all
but the last of each image. HSIC is estimated without bias in each batch of images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rear_jax import generators
from rear_jax.evaluation.diagnostics import plots
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row, chosen_split
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject
from rear_jax.metrics.cka import cka_of_batches, unbiased_hsic

CODES = "current code", "next code"


def measure(subject: Subject, quality: Quality | None) -> list[Row]:
    """A row for each layer; layer 0 is the input of the first block."""
    (split,) = chosen_split(subject.config)
    found = subject.over("cka", compile_hsic(subject), subject.pictures(split))  # arrays lead with the batches

    def alignment(layer: int, which: int) -> float:
        between, vectors = found["between"][:, layer, which], found["vectors"][:, which]
        return cka_of_batches(between, found["states"][:, layer], vectors)

    layers = range(found["states"].shape[1])
    return [{"layer": layer} | {name: alignment(layer, which) for which, name in enumerate(CODES)} for layer in layers]


def compile_hsic(subject: Subject) -> Any:
    """One program: (weights, conditions, batch) -> unbiased HSIC of the examples of a batch, each array [1, ...].

    'between' [1, depth + 1, 2] is of states and vectors, 'states' [1, depth + 1] and 'vectors' [1, 2] are of each with
    themselves.
    """
    network, tokenizer = subject.network, subject.tokenizer.module

    @jax.jit
    def program(weights, conditions, batch):
        codes, of_rows = batch["codes"], jax.tree.map(lambda leaf: jnp.asarray(leaf)[batch["rows"]], conditions)
        states = generators.hidden_states(network, weights.generator, codes, of_rows)
        states = states.reshape(len(states), -1, states.shape[-1])  # [depth + 1, B (N - 1), W]
        vectors = tokenizer.apply({"params": weights.tokenizer}, codes, method="embed")
        current, following = (part.reshape(-1, vectors.shape[-1]) for part in (vectors[:, :-1], vectors[:, 1:]))
        vectors = jnp.stack([current, following])  # [2, B (N - 1), D]
        between = jax.lax.map(lambda x: jnp.stack([unbiased_hsic(x, y) for y in vectors]), states)
        within = [jax.lax.map(lambda x: unbiased_hsic(x, x), features) for features in (states, vectors)]
        return {"between": between[None], "states": within[0][None], "vectors": within[1][None]}

    return program


def _draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Both columns in one panel."""
    long = [{"layer": row["layer"], "vectors of": name, "CKA": row[name]} for name in CODES for row in rows]
    plots.lines(path, title, long, along="layer", label="layer (0 = input of the first block)", by="vectors of")


DIAGNOSTIC = Diagnostic(
    name="cka",
    title="CKA of hidden states with the codebook's vectors",
    meaning="Linear, centred, without bias: 1 is the same up to rotation and scale, 0 is independent.",
    splits=chosen_split,
    reads=("batch_size",),
    draws=False,
    scores=False,
    measure=measure,
    draw=_draw,
)
