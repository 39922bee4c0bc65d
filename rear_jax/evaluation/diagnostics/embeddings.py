"""Embedding unawareness: wrong codes whose vectors are near to the right ones decode to better images.

reAR (arXiv 2510.04450, section 3): a generator that knows codes as numbers alone does not tell such a wrong code from
any other. Of its teacher-forced predictions, the wrong ones are replaced with probability r' by the wrong code that is
nearest to the right one. As many codes are right as before, and how much better the images are says what a generator
that knew the codebook could gain. A prediction is the most probable code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax.evaluation.diagnostics import plots
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row, chosen_split
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject
from rear_jax.metrics.codes import nearest_wrong, replace_wrong

REPLACED = 2  # purpose of random keys


def measure(subject: Subject, quality: Quality) -> list[Row]:
    """A row for each probability r'."""
    (split,) = chosen_split(subject.config)
    pictures = subject.pictures(split)
    keys, nearest = subject.keys(REPLACED, len(pictures.codes)), nearest_wrong(subject.tokenizer.codebook())

    @jax.jit
    def predict(weights, conditions, batch):
        logits = subject.predict(weights, conditions, batch, batch["codes"])
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    predicted, rows = subject.over("embeddings, predictions", predict, pictures), []
    for share in sorted(subject.config.analyze.nearest_shares):
        name = f"embeddings, r' = {share:g}"
        codes = np.asarray(replace_wrong(keys, predicted, pictures.codes, nearest, share))
        images = subject.decode(name, pictures, codes)
        ratio = float((codes == pictures.codes).mean())
        rows.append({"replaced": float(share), "CTR": ratio, **quality.of(name, pictures.images, images)})
    return rows


DIAGNOSTIC = Diagnostic(
    name="embeddings",
    title="Embedding unawareness: images by the share of wrong codes that become the nearest wrong ones",
    meaning="CTR: share of teacher-forced predictions (the most probable code) that are right; it does not change.",
    splits=chosen_split,
    reads=("nearest_shares",),
    draws=False,
    scores=True,
    measure=measure,
    draw=functools.partial(plots.lines, along="replaced", label="r', probability of replacement"),
)
