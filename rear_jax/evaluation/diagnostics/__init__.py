"""The diagnostics of `--job=analyze`, one file each with a `DIAGNOSTIC`.

To add one, write its file and name it in DIAGNOSTICS.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.evaluation.diagnostics import accuracy, alignment, consistency, embeddings, exposure
from rear_jax.evaluation.diagnostics.diagnostic import Diagnostic
from rear_jax.evaluation.diagnostics.quality import Quality
from rear_jax.evaluation.diagnostics.subject import Subject
from rear_jax.runtime.mesh import check_batch
from rear_jax.sampling.generate import sampler_of

DIAGNOSTICS: dict[str, Diagnostic] = {
    one.DIAGNOSTIC.name: one.DIAGNOSTIC for one in (exposure, embeddings, accuracy, alignment, consistency)
}


def chosen(config: ConfigDict) -> list[Diagnostic]:
    """Those of `config.analyze.diagnostics`, the settings of all checked.

    Raises RearError: there are none, a name is unknown, a share is no share, or the numbers of images do not fit.
    """
    settings, names = config.analyze, config.analyze.diagnostics
    if unknown := [name for name in names if name not in DIAGNOSTICS]:
        raise RearError(f"config.analyze.diagnostics: unknown {unknown[0]!r}: use some of {', '.join(DIAGNOSTICS)}.")
    check_batch(config.mesh, settings.batch_size, 1, "config.analyze.batch_size")
    if settings.num_images < settings.batch_size or settings.num_images % settings.batch_size:
        raise RearError(
            f"config.analyze.num_images = {settings.num_images}: choose a multiple of config.analyze.batch_size = "
            f"{settings.batch_size}."
        )
    found = [DIAGNOSTICS[name] for name in dict.fromkeys(names)]
    if any(one.draws for one in found):
        sampler_of(config.sample)
    return found


def splits_of(config: ConfigDict, wanted: Iterable[Diagnostic]) -> list[str]:
    """The splits that diagnostics look at, keys of `SPLITS`."""
    return list(dict.fromkeys(split for one in wanted for split in one.splits(config)))


def recipe_of(one: Diagnostic, subject: Subject, quality: Quality | None) -> dict[str, Any]:
    """What the result of a diagnostic depends on, beside the networks."""
    config, settings = subject.config, subject.config.analyze
    recipe = {"images": {split: subject.describe(split) for split in one.splits(config)}, "seed": config.seed}
    recipe |= {key: list(value) if isinstance(value := settings[key], tuple) else value for key in one.reads}
    if one.draws:
        recipe["sampler"] = dataclasses.asdict(sampler_of(config.sample))
    if one.scores:
        recipe["scores"] = quality.recipe
    return recipe
