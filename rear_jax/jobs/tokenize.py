"""`--job=tokenize`: every image of the training split, in every view, becomes codes on disk."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, distributed
from rear_jax.data.batches import ordered_batches
from rear_jax.data.codes import HEADER, CodesHeader, write_codes
from rear_jax.data.crops import AUGMENTATIONS
from rear_jax.data.images import ImageSource, fingerprint, open_source, require_classes
from rear_jax.errors import RearError
from rear_jax.progress import ProgressBar
from rear_jax.training.mesh import fetch

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/codes`; a killed run goes on with the first shard that is missing."""
    folder = artifacts.codes_folder(config, workdir)
    tokenizer = artifacts.load_tokenizer(config, workdir)
    data, settings = config.data, config.codes
    source = open_source(data.source, data.path, data.train_split)
    require_classes(source, data.num_classes)
    distributed.agree(f"the images of {source.name}", fingerprint(source))
    if settings.augmentation not in AUGMENTATIONS:
        raise RearError(f"config.codes.augmentation = {settings.augmentation!r}: use {', '.join(AUGMENTATIONS)}.")
    header = CodesHeader(
        num_images=len(source),
        num_augmentations=AUGMENTATIONS[settings.augmentation][0],
        augmentation=settings.augmentation,
        codes_per_image=tokenizer.num_codes,
        codebook_size=config.tokenizer.codebook_size,
        image_size=data.image_size,
        num_classes=data.num_classes,
        fingerprint=tokenizer.fingerprint,
        source=source.name,
        split=data.train_split,
        num_shards=min(settings.num_shards, len(source)),
    )
    if (folder / HEADER).exists():
        log.info("tokenize: done already, checking %s", folder)
    with ProgressBar("tokenize", total=len(source), unit="image") as bar:
        write_codes(
            folder,
            header,
            _encoder(tokenizer, source, config),
            progress=lambda done, _: bar.update(done),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    log.info("tokenize: %d images x %d views in %s", header.num_images, header.num_augmentations, folder)


def _encoder(tokenizer: artifacts.Tokenizer, source: ImageSource, config: ConfigDict):
    """(start, stop) -> codes, labels and views of these images, one compiled program for all of them."""

    @jax.jit
    def encode(params, images):
        pixels = images.astype(jnp.float32) / 255.0
        return tokenizer.module.apply({"params": params}, pixels, method="encode")

    params = jax.tree.map(fetch, tokenizer.params)  # each process encodes images of its own
    views = AUGMENTATIONS[config.codes.augmentation][0]
    rows = config.codes.batch_size * views

    def encode_range(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = []
        stream = ordered_batches(
            source,
            image_size=config.data.image_size,
            batch_size=config.codes.batch_size,
            start=start,
            stop=stop,
            augmentation=config.codes.augmentation,
        )
        for batch in stream:
            count = len(batch["image"])
            padded = np.pad(batch["image"], ((0, rows - count), (0, 0), (0, 0), (0, 0)))
            codes = np.asarray(encode(params, padded))[:count]
            parts.append((codes, batch["label"], batch["augmentation"]))
        codes, labels, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
        return codes, labels, indices

    return encode_range
