"""`--job=sample`: a set of images from the generator, balanced over the classes or captions."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts, decode, distributed, models, pictures
from rear_jax.atomic import atomic_file
from rear_jax.data.captions import CaptionFile
from rear_jax.progress import ProgressBar
from rear_jax.training import mesh as placement
from rear_jax.training import sharding

log = logging.getLogger(__name__)

SHEET_CLASSES = 10  # rows of samples.png
SHEET_COLUMNS = 12
EIGHT_BIT_OFFSET = {"rar": 0.0, "llamagen": 0.5}  # what the authors add to 255 x before they cut off the fraction


class Batch(NamedTuple):
    """What one compiled call draws: B images of at most U distinct classes (or captions, by number).

    Attributes:
      indices: [B] global sample indices; a short last batch repeats its last one.
      classes: [U] distinct labels, padded by repeating the last.
      rows: [B] index into `classes`.
      count: how many of the B are wanted.
    """

    indices: np.ndarray
    classes: np.ndarray
    rows: np.ndarray
    count: int


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `samples.npz` (arr_0: uint8 [n, H, W, 3]; labels: [n]), `samples.png` and `samples.json`, the recipe."""
    settings = config.sample
    placement.check_batch(config.mesh, settings.batch_size, 1, "config.sample.batch_size")
    tokenizer = artifacts.load_tokenizer(config, workdir, stage=config.sample.stage)
    generator = artifacts.load_generator(config, workdir, tokenizer)
    conditions = conditions_of(config, generator.module)
    recipe = make_recipe(config, tokenizer, generator, conditions)
    if artifacts.is_done(workdir / "samples.json", recipe) and (workdir / "samples.npz").exists():
        log.info("sample: done already, %d images in %s", settings.num_images, workdir / "samples.npz")
        return

    labels = balanced_labels(settings.num_images, len(jax.tree.leaves(conditions)[0]))
    size = config.data.image_size
    images = np.empty((settings.num_images, size, size, 3), np.uint8)
    program = compile_sampler(config, generator.module, tokenizer.module)
    mesh, done = placement.make_mesh(config.mesh), 0
    with jax.set_mesh(mesh), ProgressBar("sample", total=settings.num_images, unit="image") as bar:
        weights = (
            jax.device_put(generator.params, sharding.shardings(generator.params, mesh)),
            jax.device_put(tokenizer.params, placement.replicated(mesh)),
        )
        for batch in plan_batches(labels, settings.batch_size):
            indices, rows = jax.device_put((batch.indices, batch.rows), placement.split(mesh))
            distinct = jax.tree.map(lambda leaf, batch=batch: leaf[batch.classes], conditions)
            drawn = program(*weights, distinct, rows, indices)
            images[batch.indices[: batch.count]] = placement.fetch(drawn)[: batch.count]
            done += batch.count
            bar.update(done)
    if not distributed.is_first():
        return
    with atomic_file(workdir / "samples.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=images, labels=labels)
    pictures.save_png(workdir / "samples.png", class_sheet(images, labels))
    artifacts.write_json(workdir / "samples.json", recipe)
    log.info("sample: wrote %d images to %s, a sheet to %s", len(images), workdir / "samples.npz", "samples.png")


def conditions_of(config: ConfigDict, model: models.Generator) -> Any:
    """All conditions there are, a tree of arrays whose leading axis is the label: classes, or captions from a file."""
    if models.takes_captions(model):
        return CaptionFile(
            config.sample.captions, option="config.sample.captions", length=model.caption_length, dim=model.caption_dim
        )[:]
    return np.arange(config.data.num_classes, dtype=np.int32)


def make_recipe(
    config: ConfigDict, tokenizer: artifacts.Tokenizer, generator: artifacts.Generator, conditions: Any
) -> dict:
    """Everything the set depends on: the same recipe gives the same images, whatever the batch size or device count."""
    if models.takes_captions(generator.module):
        captions = artifacts.fingerprint(conditions._asdict(), {})
        labelled = {"labels": "balanced: index modulo the number of captions", "captions": captions}
    else:
        labelled = {"labels": "balanced: index modulo the number of classes"}
    return {
        "num_images": config.sample.num_images,
        **labelled,
        **dataclasses.asdict(decode.sampler_of(config.sample)),
        "use_ema": config.sample.use_ema,
        "seed": config.seed,
        "generator_step": generator.step,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "decoder": tokenizer.decoder,
    }


def balanced_labels(count: int, num_classes: int) -> np.ndarray:
    """Label of each sample by its global index alone: every prefix of the set is as balanced as it can be."""
    return (np.arange(count) % num_classes).astype(np.int32)


def plan_batches(labels: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Cuts the set into batches of few classes each, so that what depends on the class is computed for few."""
    order = np.argsort(labels, kind="stable")
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    most_classes = max(len(np.unique(labels[part])) for part in parts)
    for part in parts:
        indices = np.pad(part, (0, batch_size - len(part)), mode="edge").astype(np.int32)
        classes, rows = np.unique(labels[indices], return_inverse=True)
        classes = np.pad(classes, (0, most_classes - len(classes)), mode="edge").astype(np.int32)
        yield Batch(indices, classes, rows.astype(np.int32), len(part))


def compile_sampler(config: ConfigDict, generator: models.Generator, tokenizer: Any):
    """One program: (generator params, tokenizer params, conditions, rows, indices) -> uint8 images [B, H, W, 3]."""
    decoder, sampler = models.decoder_of(generator), decode.sampler_of(config.sample)
    offset = EIGHT_BIT_OFFSET[config.model.name]

    def draw(generator_params, tokenizer_params, conditions, rows, indices):
        base = jax.random.key(config.seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(base, indices)
        codes = decode.generate(decoder, generator_params, conditions, rows, keys, sampler)
        images = tokenizer.apply({"params": tokenizer_params}, codes, method="decode")
        return jnp.clip(255.0 * images.astype(jnp.float32) + offset, 0.0, 255.0).astype(jnp.uint8)

    return jax.jit(draw)


def class_sheet(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A picture with one row per class or caption, the first few of them and samples of each."""
    rows = []
    for label in np.unique(labels)[:SHEET_CLASSES]:
        of_class = images[labels == label][:SHEET_COLUMNS]
        missing = SHEET_COLUMNS - len(of_class)
        rows.append(np.pad(of_class, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255))
    return pictures.grid(np.concatenate(rows), SHEET_COLUMNS)
