"""`--job=sample`: a set of images from the generator, balanced over the classes or captions, or prompt by prompt."""

import functools
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.data.archive import ImageArchive
from rear_jax.data.class_names import class_names
from rear_jax.data.prompts import Prompt, write_prompts
from rear_jax.errors import RearError
from rear_jax.evaluation import geneval, hpsv2
from rear_jax.runtime import distributed, pictures, places
from rear_jax.runtime.atomic import read_json, write_json
from rear_jax.runtime.identity import environment, is_done
from rear_jax.runtime.mesh import check_batch, make_mesh, replicated
from rear_jax.runtime.progress import ProgressBar
from rear_jax.runtime.stopping import Interrupted, StopSign, any_raised
from rear_jax.sampling import draw, sheet
from rear_jax.sampling.conditions import Conditions, check_conditions, open_conditions, prompts_of
from rear_jax.sampling.generate import sampler_of
from rear_jax.sampling.sampled_set import SampledSet
from rear_jax.sampling.uploaded_set import open_set
from rear_jax.training import sampled

log = logging.getLogger(__name__)

CHUNK = 64  # images that are read at once on their way to PNG files


def run(config: ConfigDict, workdir: Path, place: Path | None = None) -> None:
    """Writes `samples.npz` (arr_0: uint8 [n, H, W, 3]; labels: [n]), `samples.png` and `samples.json`.

    The latter holds the recipe, and beside it what does not decide whether a set is done: the stage that the generator
    is from, and the libraries and platforms that drew. With prompts, `prompts.jsonl` holds them: the label of an image
    is the number of its prompt.

    What is drawn goes to `samples.partial` batch by batch, where the same command finds it after an interruption.

    The networks are in `workdir`; the set goes to `place`, if not there as well.
    """
    place = place or workdir
    settings = config.sample
    _check_settings(config)
    tokenizer, generator = sampled.load(config, workdir)
    conditions = open_conditions(config, workdir, generator.module)
    generator.require_text_encoder(conditions.recipe.get("text_encoder", ""))
    labels, prompts = conditions.labels, conditions.prompts
    recipe = make_recipe(config, tokenizer, generator, conditions)
    few = not (settings.num_images or settings.classes or prompts)
    if count := _finished(place, recipe, few=few):
        log.info("sample: done already, %d images in %s", count, place / "samples.npz")
        if distributed.is_first():
            _tidy(place, recipe | {"num_images": count}, settings, prompts)
        return

    partial = _open_partial(place, recipe, (len(labels), *draw.image_shape(config)))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = draw.compile_sampler(config, generator.module, tokenizer.module)
        program = functools.partial(program, *draw.place(generator, tokenizer, mesh))
        _draw_missing(config, program, conditions, partial, mesh)
    if not distributed.is_first():
        return
    partial.export(place / "samples.npz", labels)
    pictures.save_png(place / "samples.png", _sheet(config, partial.images, conditions))
    if settings.png_folder:
        with places.staged(place / "samples") as folder:
            pictures.save_folder(folder, partial.images, _names(settings, prompts))
    _write_for_scorers(place, settings, prompts, lambda: partial.images)
    drawn = read_json(place / "samples.partial" / "drawn_with.json")
    write_json(place / "samples.json", recipe | {"stage": settings.stage} | drawn)
    partial.remove()
    log.info("sample: wrote %d images to %s, a sheet to %s", len(labels), place / "samples.npz", "samples.png")


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    _check_settings(config)
    network = sampled.check(config, workdir, before)
    check_conditions(config, workdir, network, before)
    if config.sample.geneval:
        geneval.check_prompts(prompts_of(config, network), config.sample.images_per_prompt)
    if config.sample.hpsv2:
        hpsv2.check_prompts(prompts_of(config, network))


def _check_settings(config: ConfigDict) -> None:
    check_batch(config.mesh, config.sample.batch_size, 1, "config.sample.batch_size")
    sampler_of(config.sample)
    if config.sample.geneval and not config.sample.prompts:
        raise RearError("config.sample.geneval needs config.sample.prompts: name GenEval's evaluation_metadata.jsonl.")
    if config.sample.hpsv2 and not config.sample.prompts:
        raise RearError("config.sample.hpsv2 needs config.sample.prompts: name the folder of HPSv2's prompts.")


def _finished(place: Path, recipe: dict, *, few: bool) -> int:
    """Images of the set in `place` if it was drawn by this recipe, else 0; where a few do, a larger one will do too.

    Raises RearError: a few images would take the place of a larger set of this generator that is begun.
    """
    if not few:
        done = is_done(place / "samples.json", recipe) and (place / "samples.npz").exists()
        return recipe["num_images"] if done else 0
    alike = {key: value for key, value in recipe.items() if key not in ("num_images", "labels", "classes")}
    done, begun = (
        read_json(file).get("num_images", 0) if is_done(file, alike) else 0
        for file in (place / "samples.json", place / "samples.partial" / "recipe.json")
    )
    if done >= recipe["num_images"] and (place / "samples.npz").exists():
        return done
    if begun > recipe["num_images"]:
        raise RearError(
            f"{place / 'samples.partial'} holds the beginning of {begun} images, which {recipe['num_images']} would "
            f"replace: set config.sample.num_images = {begun} to go on with them, or use another --workdir."
        )
    return 0


def _open_partial(place: Path, recipe: dict, shape: tuple[int, int, int, int]) -> SampledSet:
    """The set as far as it was drawn, the same in every process."""
    folder = place / "samples.partial"
    if distributed.is_first():
        partial = open_set(folder, recipe, shape, write=True)
        _note_environment(folder)
    distributed.wait("samples.partial")
    if not distributed.is_first():
        partial = open_set(folder, recipe, shape, write=False)
    distributed.agree("what is drawn already, in samples.partial", np.packbits(partial.done).tobytes().hex())
    return partial


def _draw_missing(config: ConfigDict, program: Any, conditions: Conditions, partial: SampledSet, mesh: Mesh) -> None:
    """Draws what is not there yet.

    Raises:
      Interrupted: SIGTERM or SIGINT came; every batch drawn so far is on disk.
    """
    missing, total = np.flatnonzero(~partial.done), len(conditions.labels)
    stop, done = StopSign(mesh, ahead=0), total - len(missing)
    ask = jax.jit(any_raised, out_shardings=replicated(mesh))
    if done:
        log.info("sample: going on, %d of %d images are there", done, total)
    with stop.listening(), ProgressBar("sample", total=total, start=done, unit="image") as bar:
        for batch in draw.plan_batches(conditions.labels, missing, draw.batch_size(config, total, mesh)):
            images = draw.draw_batch(program, conditions, batch, mesh)
            if distributed.is_first():
                partial.add(batch.indices[: batch.count], images)
            done += batch.count
            bar.update(done)
            flags = stop.flags()
            if stop.stops_after(None if flags is None else ask(flags)) and done < total:
                partial.keep()
                raise Interrupted(f"sample: {done} of {total} images are drawn; resume with the same command.")


def make_recipe(
    config: ConfigDict, tokenizer: artifacts.Tokenizer, generator: artifacts.Generator, conditions: Conditions
) -> dict:
    """Everything the set depends on but rounding: one that is begun or done is this command's if it has this recipe."""
    of_set = draw.recipe_of(config, generator.module, tokenizer, conditions, len(conditions.labels))
    return of_set | {"generator_step": generator.step, "generator": generator.fingerprint}


def _note_environment(folder: Path) -> None:
    """Adds the libraries and the platform of this process to those that the set in `folder` was drawn with so far."""
    file, now = folder / "drawn_with.json", environment()
    earlier = read_json(file).get("drawn_with")
    others = [one for one in earlier if one != now] if isinstance(earlier, list) else []
    write_json(file, {"drawn_with": [*others, now]})


def _tidy(place: Path, recipe: dict, settings: ConfigDict, prompts: Sequence[Prompt]) -> None:
    """Beside a set that is done: removes it as it was drawn, and writes the PNGs if they are wanted and not there."""
    partial, file, folder = place / "samples.partial", place / "samples.npz", place / "samples"
    if is_done(partial / "recipe.json", recipe):
        places.remove(partial)
    if settings.png_folder and not places.is_newer(folder, file):
        with places.staged(folder) as made:
            pictures.save_folder(made, _images_in(file), _names(settings, prompts))
        log.info("sample: wrote %d PNG files to %s", recipe["num_images"], folder)
    _write_for_scorers(place, settings, prompts, lambda: _images_in(file))


def _images_in(file: Path) -> Iterator[np.ndarray]:
    """The images of a set that is done, a few of them read at once."""
    for batch in ImageArchive(file, remedy="delete it and run --job=sample again").batches(CHUNK):
        yield from batch


def _sheet(config: ConfigDict, images: np.ndarray, conditions: Conditions) -> np.ndarray:
    """The picture of a set."""
    if conditions.prompts:
        return sheet.prompt_sheet(images, conditions.prompts)
    names = () if "captions" in conditions.recipe else class_names(config.data)
    return sheet.class_sheet(images, conditions.labels, names)


def _names(settings: ConfigDict, prompts: Sequence[Prompt]) -> list[str]:
    """Of the PNG files of images that were drawn for prompts."""
    return [
        pictures.prompt_file_name(number, prompt.text, image)
        for number, prompt in enumerate(prompts)
        for image in range(settings.images_per_prompt)
    ]


def _write_for_scorers(
    place: Path, settings: ConfigDict, prompts: Sequence[Prompt], images: Callable[[], Iterable[np.ndarray]]
) -> None:
    """What goes with a set that was drawn for prompts: these, and the folders of benchmarks that are wanted."""
    if prompts:
        write_prompts(place / "prompts.jsonl", prompts)
    if settings.geneval:
        with places.staged(place / "geneval") as folder:
            written = geneval.write_folder(folder, prompts, images(), settings.images_per_prompt)
        log.info("sample: wrote %d of %d prompts to %s", written, len(prompts), place / "geneval")
    if settings.hpsv2:
        first = itertools.islice(images(), 0, None, settings.images_per_prompt)
        with places.staged(place / "hpsv2") as folder:
            written = hpsv2.write_folder(folder, prompts, first)
        log.info("sample: wrote %d of %d prompts to %s", written, len(prompts), place / "hpsv2")
