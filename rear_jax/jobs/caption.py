"""`--job=caption`: the captions of the images become features on disk, for training and post-training."""

import functools
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, generators
from rear_jax.data.caption_shards import HEADER, CaptionsHeader, Rows, refuse_other_plan, write_captions
from rear_jax.data.sources import agreed_contents, open_split, split_facts
from rear_jax.data.sources.interface import CaptionedSource, spread
from rear_jax.errors import RearError
from rear_jax.runtime import distributed, local_devices
from rear_jax.runtime.identity import fingerprint
from rear_jax.runtime.progress import ProgressBar
from rear_jax.text import random_encoder
from rear_jax.text.encoder import TextEncoder
from rear_jax.training import objectives

log = logging.getLogger(__name__)

PROBES = 4096  # captions that the fingerprint of a split is taken of
READ = 100_000  # captions that the vocabulary of an encoder from nothing is made of


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/captions/<split>` for both splits; a killed run goes on with the first shard that is missing.

    With `config.text.encoder = 'random'` a small encoder is made first, see `text/random_encoder.py`. With
    `config.text.on_the_fly` that is all: the steps that read the captions encode them.
    """
    generator = _generator(config)
    sources = {split: open_split(config.data, split) for split in _splits(config)}
    if config.text.encoder == artifacts.RANDOM:
        _make_encoder(config, workdir, generator, sources[config.data.train_split])
    if config.text.on_the_fly:
        log.info("caption: config.text.on_the_fly: steps encode captions, no features are stored")
        return
    encoder = artifacts.open_text_encoder(config, workdir, generator)
    encode = _encoder(config, encoder)
    for split, source in sources.items():
        folder = artifacts.captions_folder(config, workdir, split)
        header = CaptionsHeader(
            num_captions=len(source),
            length=encoder.length,
            dim=generator.caption_dim,
            dtype=config.text.dtype,
            encoder=encoder.fingerprint,
            captions=_fingerprint(source),
            source=source.name,
            split=split,
        )
        distributed.agree(f"the captions of {source.name}", header.captions)
        if (folder / HEADER).exists():
            log.info("caption: done already, checking %s", folder)
        with ProgressBar(f"caption {split}", total=len(source), unit="caption") as bar:
            write_captions(
                folder,
                header,
                functools.partial(encode, source),
                progress=bar.update,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        log.info("caption: %d captions in %s", len(source), folder)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    generator = _generator(config)
    artifacts.check_text_encoder(config, workdir, generator, (*before, "caption"))
    for split in _splits(config):
        facts = split_facts(config.data, split)
        if not facts.captioned:
            raise RearError(f"{facts.name} ({split}) has no captions: give config.data.source a set that has them.")
        if config.text.on_the_fly:
            continue
        folder = artifacts.captions_folder(config, workdir, split)
        length, dim = artifacts.text_length(config, generator), generator.caption_dim
        header = CaptionsHeader(facts.num_images, length, dim, config.text.dtype, "", "", facts.name, split)
        refuse_other_plan(folder, header, but=("encoder", "captions"))


def _splits(config: ConfigDict) -> tuple[str, ...]:
    """Those whose captions are wanted, the training split first."""
    return tuple(dict.fromkeys((config.data.train_split, config.data.eval_split)))


def _generator(config: ConfigDict) -> nn.Module:
    """The network that takes the captions; raises RearError where it takes none."""
    generator = objectives.build_generator(config, artifacts.outline_tokenizer(config).module)
    if generators.reads_tokens(generator):
        raise RearError(
            f"--job=caption: config.model.name = {config.model.name!r} reads text itself: leave the job out."
        )
    if not generators.takes_captions(generator):
        raise RearError("--job=caption: the generator takes classes; set config.model.condition = 'text'.")
    return generator


def _make_encoder(config: ConfigDict, workdir: Path, generator: nn.Module, source: CaptionedSource) -> None:
    """An encoder from nothing, in the workdir, if it is not there."""
    folder = artifacts.encoder_folder(workdir)
    if distributed.is_first() and not (folder / random_encoder.WEIGHTS).exists():
        random_encoder.make(
            folder,
            (source.caption(number) for number in spread(len(source), READ).tolist()),
            artifacts.encoder_sizes(config, generator),
            seed=config.seed,
        )
        log.info("caption: made a text encoder with random weights in %s", folder)
    distributed.wait("text_encoder")


def _fingerprint(source: CaptionedSource) -> str:
    """Tells captions apart by the files that they are in, by their number and by some of them, evenly spread."""
    some = [source.caption(number) for number in spread(len(source), PROBES).tolist()]
    return fingerprint({}, {"count": len(source), "captions": some, "contents": agreed_contents(source)})


def _encoder(config: ConfigDict, encoder: TextEncoder):
    """(source, start, stop) -> features of these captions, a batch at a time.

    A batch has the next power of two of tokens that is enough for its longest caption, so few programs are compiled.
    """
    params = local_devices.copied(encoder.params)  # each process encodes captions of its own
    program = functools.partial(jax.jit(encoder.features), params)
    rows = -(-config.text.batch_size // jax.process_count())

    def encode(source: CaptionedSource, start: int, stop: int) -> Iterator[Rows]:
        def tokens() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for first in range(start, stop, rows):
                texts = [source.caption(number) for number in range(first, min(first + rows, stop))]
                ids, mask = encoder.tokens(texts)
                length = 2 ** math.ceil(math.log2(mask.sum(axis=1).max()))
                yield ids[:, :length], mask[:, :length]

        for features, mask in local_devices.stream(lambda batch: program(*batch), tokens(), size=rows):
            yield Rows(features, mask)

    return encode
