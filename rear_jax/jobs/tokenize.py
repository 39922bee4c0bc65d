"""`--job=tokenize`: every image of the training split, in every view, becomes codes on disk."""

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.data.batches import ordered_batches
from rear_jax.data.codes import write_codes
from rear_jax.data.codes_header import HEADER, CodesHeader, refuse_other_plan
from rear_jax.data.crops import AUGMENTATIONS
from rear_jax.data.sources import SplitFacts, agreed_contents, facts_of, fingerprint, open_split, split_facts
from rear_jax.data.sources.interface import ImageSource
from rear_jax.errors import RearError
from rear_jax.runtime import distributed, local_devices
from rear_jax.runtime.mesh import fetch
from rear_jax.runtime.progress import ProgressBar

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/codes`; a killed run goes on with the first shard that is missing."""
    folder = artifacts.codes_folder(config, workdir)
    _check_settings(config)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    source = open_split(config.data, config.data.train_split)
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    header = dataclasses.replace(_header(config, tokenizer, facts_of(source)), images=agreed_contents(source))
    if (folder / HEADER).exists():
        log.info("tokenize: done already, checking %s", folder)
    with ProgressBar("tokenize", total=len(source), unit="image") as bar:
        write_codes(folder, header, _encoder(tokenizer, source, config), progress=lambda done, _: bar.update(done))
    log.info("tokenize: %d images x %d views in %s", header.num_images, header.num_augmentations, folder)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    _check_settings(config)
    artifacts.check_tokenizer(config, workdir, before)
    facts = split_facts(config.data, config.data.train_split)
    header = _header(config, artifacts.outline_tokenizer(config), facts)
    others = () if distributed.is_first() else ("images",)
    refuse_other_plan(artifacts.codes_folder(config, workdir), header, but=("fingerprint", *others))


def _check_settings(config: ConfigDict) -> None:
    settings = config.codes
    if settings.augmentation not in AUGMENTATIONS:
        raise RearError(f"config.codes.augmentation = {settings.augmentation!r}: use {', '.join(AUGMENTATIONS)}.")


def _header(config: ConfigDict, tokenizer: artifacts.Tokenizer, facts: SplitFacts) -> CodesHeader:
    """What will be written of the images of a split."""
    data, settings = config.data, config.codes
    return CodesHeader(
        num_images=facts.num_images,
        num_augmentations=AUGMENTATIONS[settings.augmentation][0],
        augmentation=settings.augmentation,
        codes_per_image=tokenizer.num_codes,
        codebook_size=config.tokenizer.codebook_size,
        image_size=data.image_size,
        num_classes=facts.num_classes if facts.captioned else data.num_classes,
        fingerprint=tokenizer.fingerprint,
        source=facts.name,
        split=data.train_split,
        num_shards=min(settings.num_shards, facts.num_images),
        dtype=config.tokenizer.dtype,
        precision=tokenizer.module.precision,
        images=facts.contents,
    )


def _encoder(tokenizer: artifacts.Tokenizer, source: ImageSource, config: ConfigDict):
    """(start, stop) -> codes, labels and views of these images, one compiled program for all of them."""

    @jax.jit
    def encode(params, images):
        pixels = images.astype(jnp.float32) / 255.0
        return tokenizer.module.apply({"params": params}, pixels, method="encode")

    params = local_devices.copied(jax.tree.map(fetch, tokenizer.params))  # each process encodes images of its own
    rows = config.codes.batch_size * jax.local_device_count()
    views = AUGMENTATIONS[config.codes.augmentation][0]

    def encode_range(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels, indices = [], []

        def images() -> Iterator[np.ndarray]:
            for batch in ordered_batches(
                source,
                image_size=config.data.image_size,
                batch_size=-(-rows // views),
                start=start,
                stop=stop,
                augmentation=config.codes.augmentation,
            ):
                labels.append(batch["label"])
                indices.append(batch["augmentation"])
                yield batch["image"]

        codes = list(local_devices.stream(functools.partial(encode, params), regrouped(images(), rows), size=rows))
        return np.concatenate(codes), np.concatenate(labels), np.concatenate(indices)

    return encode_range


def regrouped(batches: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The rows of batches of any size, so many at a time and in order; the last array holds what is left."""
    held = None
    for batch in batches:
        held = batch if held is None else np.concatenate([held, batch])
        while len(held) >= rows:
            yield held[:rows]
            held = held[rows:]
    if held is not None and len(held):
        yield held
