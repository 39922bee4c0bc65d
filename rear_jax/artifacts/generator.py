"""Generators as jobs leave them or others publish them."""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts import published
from rear_jax.artifacts.classes import for_classes_of, refuse_other_classes, with_new_classes
from rear_jax.artifacts.tokenizer import Tokenizer
from rear_jax.artifacts.workdir import (
    best_generator_folder,
    generator_folder,
    open_checkpoints,
    posttrained_folder,
    saved,
    to_be_made,
)
from rear_jax.errors import RearError
from rear_jax.runtime import identity, places, sharding
from rear_jax.runtime.checkpoints import Checkpoints, Saved, abstract
from rear_jax.runtime.mesh import make_mesh

log = logging.getLogger(__name__)

STAGES = {  # value of config.sample.stage -> the job that trained the generator, and where it is
    "train": ("train", generator_folder),
    "best": ("train", best_generator_folder),
    "posttrain": ("posttrain", posttrained_folder),
}


@dataclasses.dataclass(frozen=True)
class Generator:
    """A trained generator: module, parameters, the step they are from, and their hash.

    `text_encoder` is the fingerprint of the encoder whose features it was trained with, '' where nobody knows.
    """

    module: Any
    params: Any
    step: int
    fingerprint: str
    text_encoder: str = ""

    def require_text_encoder(self, fingerprint: str) -> None:
        """Raises RearError where features of another text encoder are to be given to it."""
        refuse_other_encoder(self.text_encoder, fingerprint, "the generator")


def refuse_other_encoder(made_with: str, now: str, whose: str) -> None:
    """Raises RearError where both fingerprints of text encoders are known, and differ."""
    if made_with and now and made_with != now:
        raise RearError(
            f"{whose} was trained with features of text encoder {made_with}, these are of {now}: use the config.text "
            "that it was trained with."
        )


def load_generator(
    config: ConfigDict, workdir: Path, tokenizer: Tokenizer, network: nn.Module, *, stage: str
) -> Generator:
    """The generator that a job has made so far, or the one of `config.init_from` where `--job=train` has made none.

    The job is that of `stage`, a key of STAGES; `tokenizer` is what the generator must have been made with.

    Raises RearError: it is missing, damaged, of other sizes, or made with another tokenizer.
    """
    _check_ema_of(stage, config)
    job, folder = STAGES[stage]
    place = folder(workdir)
    if config.init_from and stage == "train" and not place.exists():
        params = read_generator(places.place(config.init_from), config, network, tokenizer, ema=config.sample.use_ema)
        return Generator(network, params, 0, identity.fingerprint(params, {}))
    checkpoints = open_checkpoints(place, job)
    record = _checked_record(checkpoints, config, tokenizer)
    _require_ema(checkpoints.keeps_average(), config, place)
    step, params = _restore(checkpoints, config, network, ema=config.sample.use_ema)
    return Generator(network, params, step, identity.fingerprint(params, {}), record.get("text_encoder", ""))


def read_generator(
    place: Path,
    config: ConfigDict,
    network: nn.Module,
    tokenizer: Tokenizer | None,
    *,
    text_encoder: str = "",
    ema: bool = False,
) -> Any:
    """Parameters of the config's generator from a published file, a converted folder, or that of `--job=train`.

    Optional modules that `place` does not have are left out. `tokenizer` and the fingerprint of a text encoder are what
    the generator must have been made with, where `place` knows; None and '' ask nothing. `ema` asks for the moving
    average of the parameters.
    """
    if published.weights_file(place) is not None:
        _require_section(ema, config, place)
        refuse_other_classes(place, config, network)
        family = generators.family_of(network)
        return published.read_params(place, config, family, family.shapes(network))
    published.refuse_section(place, config, generators.family_of(network))
    checkpoints = open_checkpoints(place, "train")
    record = _checked_record(checkpoints, config, tokenizer)
    refuse_other_encoder(record.get("text_encoder", ""), text_encoder, f"the generator in {place}")
    if ema:
        _require_ema(checkpoints.keeps_average(), config, place)
    return _restore(checkpoints, config, network, ema=ema)[1]


def read_start(
    place: Path, config: ConfigDict, network: nn.Module, tokenizer: Tokenizer, *, text_encoder: str = ""
) -> Any:
    """As `read_generator`, to be trained further: where it is of other classes than the config, all of these are new.

    The log tells.
    """
    there, its_own = for_classes_of(place, config, network)
    params = read_generator(place, there, its_own, tokenizer, text_encoder=text_encoder)
    if its_own.num_classes == network.num_classes:
        return params
    told = place, its_own.num_classes, network.num_classes
    log.warning("%s has %d classes and config.data.num_classes is %d: these start fresh, and nothing else does", *told)
    return with_new_classes(params, config, network)


def check_stage(config: ConfigDict, workdir: Path, network: nn.Module, before: Collection[str], *, stage: str) -> None:
    """Raises RearError where headers tell that `load_generator` will fail.

    `before` are jobs that run first: what these will make is not looked for.
    """
    _check_ema_of(stage, config)
    job, folder = STAGES[stage]
    place = folder(workdir)
    if to_be_made(place, config, workdir, before):
        _require_ema(config.train.ema_decay > 0, config, place)
    elif config.init_from and stage == "train" and not place.exists():
        from_place = places.place(config.init_from)
        check_generator(from_place, config, workdir, network, before, ema=config.sample.use_ema)
    else:
        _check_saved(saved(place, job), config, network, ema=config.sample.use_ema)


def check_generator(
    place: Path, config: ConfigDict, workdir: Path, network: nn.Module, before: Collection[str], *, ema: bool = False
) -> None:
    """Raises RearError where headers tell that `read_generator` cannot read `place`, unless it is still to be made."""
    if to_be_made(place, config, workdir, before):
        return
    family = generators.family_of(network)
    if published.weights_file(place) is None:
        published.refuse_section(place, config, family)
        _check_saved(saved(place, "train"), config, network, ema=ema)
    else:
        _require_section(ema, config, place)
        refuse_other_classes(place, config, network)
        published.check_params(place, config, family, family.shapes(network))


def check_start(place: Path, config: ConfigDict, workdir: Path, network: nn.Module, before: Collection[str]) -> None:
    """Raises RearError where headers tell that `read_start` will fail; see `check_generator`."""
    if not to_be_made(place, config, workdir, before):
        there, its_own = for_classes_of(place, config, network)
        check_generator(place, there, workdir, its_own, before)


def _check_saved(found: Saved, config: ConfigDict, network: nn.Module, *, ema: bool = False) -> None:
    _checked_record(found, config, None)
    if ema:
        _require_ema(found.keeps_average(), config, found.folder)
    family = generators.family_of(network)
    kept = published.without_absent(family, family.shapes(network), found.param_names())
    found.refuse_other_params(kept, ema=ema)


def _check_ema_of(stage: str, config: ConfigDict) -> None:
    if config.sample.use_ema and stage == "posttrain":
        raise RearError("config.sample.use_ema: --job=posttrain keeps no moving average: set it to False.")


def _require_ema(kept: bool, config: ConfigDict, place: Path) -> None:
    """Raises RearError where a moving average is asked for that the training did not keep."""
    if config.sample.use_ema and not kept:
        raise RearError(f"config.sample.use_ema: {place} holds no moving average; train with config.train.ema_decay.")


def _require_section(ema: bool, config: ConfigDict, place: Path) -> None:
    """Raises RearError where a published file is to give a moving average, and nobody says which of it that is."""
    if ema and not config.init_section:
        raise RearError(
            f"config.sample.use_ema is for generators that were trained here: for {place} set config.init_section, "
            "such as to 'ema', or set use_ema to False."
        )


def _checked_record(checkpoints: Saved, config: ConfigDict, tokenizer: Tokenizer | None) -> dict:
    """What is stored beside a generator; raises RearError where config or tokenizer are others."""
    record, place = checkpoints.record(), checkpoints.folder
    identity.refuse_changes(record, config, identity.GENERATOR, str(place))
    if tokenizer is not None and "tokenizer_fingerprint" in record:
        tokenizer.require(record["tokenizer_fingerprint"], f"the generator in {place}")
    return record


def _restore(checkpoints: Checkpoints, config: ConfigDict, network: nn.Module, *, ema: bool = False) -> tuple[int, Any]:
    """The newest step and its parameters, divided over the mesh as in training."""
    family = generators.family_of(network)
    present, source = checkpoints.param_names(), str(checkpoints.folder)
    shapes = published.keep_optional(family, family.shapes(network), present, source)
    places = sharding.shardings(shapes, make_mesh(config.mesh), family.parameters)
    return checkpoints.restore_params(abstract(shapes, places), ema=ema)
