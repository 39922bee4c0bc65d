"""How well the generator predicts codes of training images and of held-out ones, from clean and from noisy contexts.

The correct-token ratio (CTR) is the share of codes that are the most probable ones in teacher-forced predictions. Noise
replaces each code of the context, with some probability, by one drawn uniformly from the whole codebook; the targets
stay clean (reAR, arXiv 2510.04450).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rear_jax import losses, noise
from rear_jax.evaluation.diagnostics import plots
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import SPLITS, Subject

NOISE = 3  # purpose of random keys


def measure(subject: Subject, quality: Quality | None) -> list[Row]:
    """A row for each split and probability of noise."""

    @jax.jit
    def program(weights, conditions, batch):
        logits = subject.predict(weights, conditions, batch, batch["context"])
        return losses.correct_codes(logits, batch["codes"]), losses.next_code_cross_entropy(logits, batch["codes"])

    rows = []
    for split in ("train", "held_out"):
        pictures = subject.pictures(split)
        keys = subject.keys(NOISE, len(pictures.codes))
        for share in sorted(subject.config.analyze.noise_shares):
            context = np.asarray(with_noise(keys, pictures.codes, share, subject.codebook_size))
            name = f"accuracy, {split} images, {share:g} of the context random"
            correct, surprise = subject.over(name, program, pictures, context=context)
            values = {"CTR": float(correct.mean()), "perplexity": float(np.exp(surprise.mean()))}
            rows.append({"images": split.replace("_", "-"), "random context": float(share), **values})
    return rows


def with_noise(keys: jax.Array, codes: np.ndarray, share: float, codebook_size: int) -> jax.Array:
    """Codes [n, N] of which each is replaced by a random one with probability `share`; `keys` [n] are the images'."""

    def of_one(key, one):
        return noise.corrupt(key, one[None], jnp.full(1, share), codebook_size)[0][0]

    return jax.vmap(of_one)(keys, jnp.asarray(codes))


DIAGNOSTIC = Diagnostic(
    name="accuracy",
    title="Predictions on training and held-out images, by the noise in the context",
    meaning=(
        "CTR: share of codes that are the most probable ones in teacher-forced predictions. Perplexity: exp of the "
        "mean cross-entropy; guessing gives the size of the codebook."
    ),
    splits=lambda config: tuple(SPLITS),
    reads=("noise_shares",),
    draws=False,
    scores=False,
    measure=measure,
    draw=functools.partial(plots.lines, along="random context", label="share of random codes in context", by="images"),
)
