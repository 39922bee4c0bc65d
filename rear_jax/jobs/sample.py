"""`--job=sample`: a set of images from the generator, balanced over the classes or captions."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import artifacts, decode, distributed, models, pictures, sampling
from rear_jax.data.sampled_set import SampledSet
from rear_jax.progress import ProgressBar
from rear_jax.training import mesh as placement
from rear_jax.training import sharding
from rear_jax.training.loop import Interrupted
from rear_jax.training.stopping import StopSign, any_raised

log = logging.getLogger(__name__)

SHEET_CLASSES = 10  # rows of samples.png
SHEET_COLUMNS = 12


def run(config: ConfigDict, workdir: Path, place: Path | None = None) -> None:
    """Writes `samples.npz` (arr_0: uint8 [n, H, W, 3]; labels: [n]), `samples.png` and `samples.json`, the recipe.

    What is drawn goes to `samples.partial` batch by batch, where the same command finds it after an interruption.

    Args:
      config: the experiment.
      workdir: where the networks are.
      place: where the set goes, if not there as well.
    """
    place = place or workdir
    settings = config.sample
    placement.check_batch(config.mesh, settings.batch_size, 1, "config.sample.batch_size")
    tokenizer = artifacts.load_tokenizer(config, workdir, stage=config.sample.stage)
    generator = artifacts.load_generator(config, workdir, tokenizer)
    conditions = sampling.conditions_of(config, generator.module)
    recipe = make_recipe(config, tokenizer, generator, conditions)
    if artifacts.is_done(place / "samples.json", recipe) and (place / "samples.npz").exists():
        log.info("sample: done already, %d images in %s", settings.num_images, place / "samples.npz")
        return

    labels = sampling.balanced_labels(settings.num_images, len(jax.tree.leaves(conditions)[0]))
    partial = _open_partial(place, recipe, (settings.num_images, *sampling.image_shape(config)))
    mesh = placement.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        weights = (
            jax.device_put(generator.params, sharding.shardings(generator.params, mesh)),
            jax.device_put(tokenizer.params, placement.replicated(mesh)),
        )
        program = sampling.compile_sampler(config, generator.module, tokenizer.module)
        _draw_missing(config, functools.partial(program, *weights), conditions, labels, partial, mesh)
    if not distributed.is_first():
        return
    partial.export(place / "samples.npz", labels)
    pictures.save_png(place / "samples.png", class_sheet(partial.images, labels))
    if settings.png_folder:
        pictures.save_folder(place / "samples", partial.images)
    artifacts.write_json(place / "samples.json", recipe)
    partial.remove()
    log.info("sample: wrote %d images to %s, a sheet to %s", len(labels), place / "samples.npz", "samples.png")


def _open_partial(place: Path, recipe: dict, shape: tuple[int, int, int, int]) -> SampledSet:
    """The set as far as it was drawn, the same in every process."""
    folder = place / "samples.partial"
    if distributed.is_first():
        partial = SampledSet(folder, recipe, shape, write=True)
    distributed.wait("samples.partial")
    if not distributed.is_first():
        partial = SampledSet(folder, recipe, shape, write=False)
    distributed.agree("what is drawn already, in samples.partial", np.packbits(partial.done).tobytes().hex())
    return partial


def _draw_missing(
    config: ConfigDict, program: Any, conditions: Any, labels: np.ndarray, partial: SampledSet, mesh: Mesh
) -> None:
    """Draws what is not there yet.

    Raises:
      Interrupted: SIGTERM or SIGINT came; every batch drawn so far is on disk.
    """
    missing, total = np.flatnonzero(~partial.done), len(labels)
    stop, done = StopSign(mesh, ahead=0), total - len(missing)
    ask = jax.jit(any_raised, out_shardings=placement.replicated(mesh))
    if done:
        log.info("sample: going on, %d of %d images are there", done, total)
    with stop.listening(), ProgressBar("sample", total=total, start=done, unit="image") as bar:
        for batch in sampling.plan_batches(labels, missing, config.sample.batch_size):
            images = sampling.draw_batch(program, conditions, batch, mesh)
            if distributed.is_first():
                partial.add(batch.indices[: batch.count], images)
            done += batch.count
            bar.update(done)
            flags = stop.flags()
            if stop.stops_after(None if flags is None else ask(flags)) and done < total:
                raise Interrupted(f"sample: {done} of {total} images are drawn; resume with the same command.")


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
        "image_size": sampling.image_shape(config)[0],
        **labelled,
        **dataclasses.asdict(decode.sampler_of(config.sample)),
        "use_ema": config.sample.use_ema,
        "seed": config.seed,
        "generator_step": generator.step,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "decoder": tokenizer.decoder,
    }


def class_sheet(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A picture with one row per class or caption, the first few of them and samples of each."""
    rows = []
    for label in np.unique(labels)[:SHEET_CLASSES]:
        of_class = images[labels == label][:SHEET_COLUMNS]
        missing = SHEET_COLUMNS - len(of_class)
        rows.append(np.pad(of_class, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=255))
    return pictures.grid(np.concatenate(rows), SHEET_COLUMNS)
