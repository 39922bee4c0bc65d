"""The networks that `config.sample.stage` chooses, for every job that draws with them or looks at them.

`load` opens what `check` has found in headers: the same places, the same errors.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.errors import RearError
from rear_jax.runtime import sharding
from rear_jax.runtime.mesh import make_mesh
from rear_jax.training import objectives, posttraining


class Sampled(NamedTuple):
    """A generator, and the tokenizer whose codes it draws."""

    tokenizer: artifacts.Tokenizer
    generator: artifacts.Generator


def load(config: ConfigDict, workdir: Path) -> Sampled:
    """Both networks, from the workdir or from the files that the config names.

    Raises RearError: one is missing, damaged, of other sizes, or was made with another one.
    """
    tokenizer, (stage, _) = load_tokenizer(config, workdir), _stage(config)
    network = objectives.build_generator(config, tokenizer.module)
    return Sampled(tokenizer, artifacts.load_generator(config, workdir, tokenizer, network, stage=stage))


def load_tokenizer(config: ConfigDict, workdir: Path) -> artifacts.Tokenizer:
    """The tokenizer, with the decoder of the stage; raises RearError as `load`."""
    return artifacts.load_tokenizer(config, workdir, decoder_posttrained=_stage(config)[1])


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> nn.Module:
    """The generator's module; `before` are jobs that run first: what these will make is not looked for.

    Raises RearError: headers tell that `load` will fail, or the generator does not fit the mesh.
    """
    check_tokenizer(config, workdir, before)
    network = objectives.build_generator(config, artifacts.outline_tokenizer(config).module)
    artifacts.check_stage(config, workdir, network, before, stage=_stage(config)[0])
    sharding.shardings(generators.shapes(network), make_mesh(config.mesh), generators.family_of(network).parameters)
    return network


def check_tokenizer(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """Raises RearError where headers tell that `load_tokenizer` will fail; `before` as in `check`."""
    artifacts.check_tokenizer(config, workdir, before, decoder_posttrained=_stage(config)[1])


def _stage(config: ConfigDict) -> tuple[str, bool]:
    """Whose generator is asked for, a key of `artifacts.STAGES`, and whether the decoder was post-trained.

    Raises RearError: there is no such stage, or no such method.
    """
    stage = config.sample.stage
    if stage not in artifacts.STAGES:
        raise RearError(f"config.sample.stage = {stage!r}: use one of {', '.join(artifacts.STAGES)}.")
    if stage == "posttrain" and posttraining.method_of(config).trains == "decoder":
        return "train", True  # post-training left the generator alone
    return stage, False
