"""`--job=train`: a generator learns to predict the codes of images."""

import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data import batches
from rear_jax.data.codes import open_codes
from rear_jax.data.codes_header import CodesHeader, check_codes, check_share, of_other_images
from rear_jax.data.sources import SplitFacts, fingerprint, open_split, split_facts
from rear_jax.data.sources.interface import ImageSource, Spread
from rear_jax.errors import RearError
from rear_jax.evaluation import watching
from rear_jax.runtime import distributed, places
from rear_jax.runtime.mesh import check_batch, make_mesh
from rear_jax.sampling.preview import previewer
from rear_jax.training import fitting, loop, objectives
from rear_jax.training.state import TrainState

log = logging.getLogger(__name__)


class _Reading(NamedTuple):
    """What training reads.

    Attributes:
      stream: start step -> iterator of this process's share of each batch.
      counts: what is counted while batches are read.
      condition: labels [n] -> what the generator is conditioned on.
      num_conditions: labels are below it.
    """

    stream: Callable[[int], Iterator[dict[str, Any]]]
    counts: Callable[[], dict[str, float]]
    condition: Callable[[np.ndarray], Any]
    num_conditions: int


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir/generator` on code files, or on images that it encodes as it goes."""
    settings = config.train.loop
    _check_settings(config)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    model = objectives.build_generator(config, tokenizer.module)
    reader = artifacts.reader_in_step(config, workdir, model)
    text_encoder = artifacts.text_encoder_of(config, workdir, model, reader)
    record = config.to_dict() | {"holds": "generator", "tokenizer_fingerprint": tokenizer.fingerprint}
    record["text_encoder"] = text_encoder
    checkpoints, saved = artifacts.resumable(artifacts.generator_folder(workdir), settings, config, "train")
    given = {}
    if saved:
        whose = f"the generator in {checkpoints.folder}"
        tokenizer.require(saved["tokenizer_fingerprint"], whose)
        artifacts.refuse_other_encoder(saved.get("text_encoder", ""), text_encoder, whose)
    elif config.init_from:
        place = places.place(config.init_from)
        given = artifacts.read_start(place, config, model, tokenizer, text_encoder=text_encoder)
        log.info("train: starting from %s", config.init_from)

    def learn(config: ConfigDict) -> loop.Learning:
        return objectives.learning(config, tokenizer, given, reader)

    count = sum(leaf.size for leaf in jax.tree.leaves(generators.shapes(model)))
    log.info("train: %s %s, %.1fM parameters", config.method.name, config.model.name, count / 1e6)
    watch = None
    if config.train.evaluate_every:
        watch = config.train.evaluate_every, watching.Watch(config, workdir, model, tokenizer, record).look
    read = _reading(config, workdir, tokenizer, model, reader)
    preview = previewer(config, model, tokenizer, read.condition, read.num_conditions)

    def draw(state: TrainState) -> dict[str, np.ndarray]:
        return {"samples": preview(state.params if state.ema is None else state.ema)}

    devices = make_mesh(config.mesh)
    run = loop.Run(read.stream, devices, record, checkpoints, workdir, draw=draw, watch=watch, counts=read.counts)
    fitting.train(config, learn, run)
    checkpoints.close()


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    _check_settings(config)
    tokenizer = artifacts.outline_tokenizer(config)
    model = objectives.build_generator(config, tokenizer.module)
    reader = artifacts.outline_reader_in_step(config, workdir, model)
    learning = objectives.learning(config, tokenizer, {}, reader)
    loop.check(learning.job, learning.settings)
    state = learning.state(make_mesh(config.mesh))
    artifacts.check_tokenizer(config, workdir, before)
    resumed = artifacts.check_resumable(artifacts.generator_folder(workdir), config, "train", state)
    if config.init_from and not resumed:
        artifacts.check_start(places.place(config.init_from), config, workdir, model, before)
    source = None
    if config.codes.on_the_fly or "tokenize" in before:
        source = split_facts(config.data, config.data.train_split)
    elif "import" not in before:
        codes = open_codes(artifacts.codes_folder(config, workdir))
        _check_header(codes.header, config, model, tokenizer.num_codes, None)
        _tell_of_other_images(codes.header, config, workdir)
        source = _facts(codes.header, model)
    if source is not None:
        artifacts.check_conditions(config, workdir, model, config.data.train_split, source, before)
    if config.train.evaluate_every:
        watching.check(config, workdir, model)


def _check_settings(config: ConfigDict) -> None:
    settings = config.train
    check_batch(config.mesh, settings.loop.batch_size, settings.accumulation or 1, "config.train.loop.batch_size")
    if config.codes.on_the_fly:
        batches.random_view_of(config.tokenizer_training.augmentation)
    else:
        check_share(config.codes.max_corrupt_share)


def _check_header(
    header: CodesHeader, config: ConfigDict, model: nn.Module, num_codes: int, fingerprint: str | None
) -> None:
    """Raises RearError unless codes are those of the config's tokenizer; a fingerprint of None fits any."""
    check_codes(
        header,
        fingerprint=fingerprint,
        codebook_size=config.tokenizer.codebook_size,
        codes_per_image=num_codes,
        num_classes=None if generators.takes_text(model) else config.data.num_classes,
    )


def _tell_of_other_images(header: CodesHeader, config: ConfigDict, workdir: Path) -> None:
    """Warns where codes are not of the images of the config; they may also be all that there is of the images.

    The first process looks: copies of the images on other hosts may have other times.
    """
    if not header.images or not distributed.is_first():
        return
    try:
        found = split_facts(config.data, config.data.train_split).contents
    except RearError as error:
        log.info("train: the codes are not compared with their images: %s", error)
        return
    if found != header.images:
        told = of_other_images(artifacts.codes_folder(config, workdir))
        log.warning("%s; it is trained on as it is: delete it and run the job `tokenize` for the images of now", told)


def _facts(header: CodesHeader, model: nn.Module) -> SplitFacts:
    """Of the split that the codes are of, which has captions if the generator takes them."""
    return SplitFacts(header.source, header.num_classes, header.num_images, generators.takes_text(model), header.images)


def _reading(
    config: ConfigDict,
    workdir: Path,
    tokenizer: artifacts.Tokenizer,
    model: nn.Module,
    reader: artifacts.TextReader | None,
) -> _Reading:
    """Opens codes or images, and the captions beside them."""
    split = config.data.train_split

    def conditioned(
        stream: Callable[[int], Iterator[dict]], source: ImageSource | SplitFacts, counts: Callable[[], dict]
    ) -> _Reading:
        if not generators.takes_text(model):
            return _Reading(stream, counts, lambda labels: labels, config.data.num_classes)
        conditions = artifacts.open_conditions(config, workdir, model, split, source, reader)
        condition = (lambda labels: reader.encode_once(conditions(labels))) if reader else conditions

        def both(start: int) -> Iterator[dict[str, Any]]:
            return artifacts.with_conditions(stream(start), conditions)

        return _Reading(both, counts, condition, source.num_classes)

    if config.codes.on_the_fly:
        source = open_split(config.data, split)
        distributed.agree(f"the images of {source.name}", fingerprint(source))

        some = Spread(source, config.train.num_images or len(source))
        loop_settings, augment = config.train.loop, config.tokenizer_training.augmentation
        return conditioned(batches.training_stream(some, config, loop_settings, augment), source, dict)

    codes = open_codes(
        artifacts.codes_folder(config, workdir),
        in_memory=config.codes.in_memory,
        max_corrupt_share=config.codes.max_corrupt_share,
    )
    _check_header(codes.header, config, model, tokenizer.num_codes, tokenizer.fingerprint)

    some = codes.read(np.linspace(0, len(codes) - 1, 64).astype(int))["codes"].tolist()
    distributed.agree(f"the codes in {artifacts.codes_folder(config, workdir)}", f"{codes.header} {some}")

    def from_codes(start: int) -> Iterator[dict[str, np.ndarray]]:
        return batches.code_batches(
            codes,
            batch_size=config.train.loop.batch_size,
            seed=config.seed,
            num_images=config.train.num_images,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return conditioned(from_codes, _facts(codes.header, model), lambda: {"corrupt_records": codes.num_corrupt})
