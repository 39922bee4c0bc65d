"""Exposure bias: how good are images of which a share of the codes is true and the others are drawn?

reAR (arXiv 2510.04450, section 3) compares two ways to have ⌊rN⌋ true codes. In front, the draws begin with a true
context and then read what was drawn before. Interleaved, true codes at random positions correct the context again and
again.
"""

import functools
from typing import Any

import jax
import numpy as np

from rear_jax.evaluation.diagnostics import plots
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic, Row, chosen_split
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject
from rear_jax.metrics.codes import count_of, front_mask, interleaved_mask
from rear_jax.sampling.generate import Given, decode, sampler_of

FRONT, INTERLEAVED = "front-loaded", "interleaved"
DRAWS, PLACES = 0, 1  # purposes of random keys


def measure(subject: Subject, quality: Quality) -> list[Row]:
    """A row for each order and share; where no code or all of them are true, both orders are the same set."""
    (split,) = chosen_split(subject.config)
    pictures, num_codes = subject.pictures(split), subject.num_codes
    program = compile_forced(subject)
    draws, places = (subject.keys(purpose, len(pictures.codes)) for purpose in (DRAWS, PLACES))
    draws = np.asarray(jax.random.key_data(draws))

    @functools.cache
    def scores(order: str, count: int) -> Row:
        name = f"exposure, {count} of {num_codes} codes true {order}".rstrip()
        shape = pictures.codes.shape
        mask = interleaved_mask(places, num_codes, count) if order == INTERLEAVED else front_mask(*shape, count)
        found = subject.over(name, program, pictures, mask=np.asarray(mask), keys=draws)
        drawn, right = ~np.asarray(mask), found["codes"] == pictures.codes
        return {
            **quality.of(name, pictures.images, found["images"]),
            "CTR": float(right.mean()),
            "CTR of drawn codes": float(right[drawn].mean()) if drawn.any() else None,
            "perplexity": float(np.exp(found["surprise"][drawn].mean())) if drawn.any() else None,
        }

    rows = []
    for order in (FRONT, INTERLEAVED):
        for share in sorted(subject.config.analyze.true_shares):
            count = count_of(share, num_codes)
            values = scores(order if 0 < count < num_codes else "", count)
            rows.append({"true codes": order, "share of true codes": float(share), **values})
    return rows


def compile_forced(subject: Subject) -> Any:
    """One program for all masks: (weights, conditions, batch with 'mask' and 'keys') -> codes, surprise and images."""
    sampler = sampler_of(subject.config.sample)

    @jax.jit
    def program(weights, conditions, batch):
        keys = jax.random.wrap_key_data(batch["keys"])
        given = Given(batch["codes"], batch["mask"])
        decoded = decode(subject.cached, weights.generator, conditions, batch["rows"], keys, sampler, given=given)
        images = subject.to_images(weights, decoded.codes)
        return {"codes": decoded.codes, "surprise": decoded.surprise, "images": images}

    return program


DIAGNOSTIC = Diagnostic(
    name="exposure",
    title="Exposure bias: images by the share of true codes",
    meaning=(
        "CTR: share of codes that are the image's own. Perplexity: of the image's own codes at the drawn positions, "
        "under the (guided) prediction from the codes before, true and drawn."
    ),
    splits=chosen_split,
    reads=("true_shares",),
    draws=True,
    scores=True,
    measure=measure,
    draw=functools.partial(plots.lines, along="share of true codes", label="r, share of true codes", by="true codes"),
)
