"""`--job=describe`: Janus-Pro writes a caption for each image of a folder, for training from text."""

import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.descriptions import Descriptions, refuse_other
from rear_jax.data.sources.broken import Broken
from rear_jax.data.sources.decoding import decode
from rear_jax.data.sources.imagefolder import METADATA, image_states, is_plain
from rear_jax.errors import RearError
from rear_jax.generators.janus import understanding_files
from rear_jax.generators.janus.preprocess import normalised, on_a_square
from rear_jax.generators.janus.understanding import Answering, Understanding, answer
from rear_jax.runtime import local_devices, places
from rear_jax.runtime.progress import ProgressBar
from rear_jax.text.janus_vocabulary import JanusVocabulary

log = logging.getLogger(__name__)

FOLDER = "descriptions"  # in the workdir, with a folder in it for each folder of images
CONTEXT = 16_384  # tokens of question and answer that the network was made for
THREADS = 4  # that decode images; each holds one

Batch = dict[str, np.ndarray]


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes metadata.jsonl beside the images; a killed run goes on with the first batch that is missing."""
    settings, images = config.describe, _images(config)
    names, vocabulary = _names(images), _vocabulary(settings)
    loaded = understanding_files.load(
        settings.weights, placeholder_id=vocabulary.image_placeholder_id, dtype=settings.dtype
    )
    recipe = _recipe(config, vocabulary) | {"weights": loaded.fingerprint}
    found = Descriptions(workdir / FOLDER / images.name, images, recipe)
    broken = Broken(images.name, config.data.max_broken_share)
    held: deque[list[int]] = deque()  # numbers of the images of batches that are on their way
    batches = _batches(images, names, found.captions, _rows(settings), loaded.module.image_size, broken, held)
    program = _program(config, loaded.module, loaded.params, vocabulary)
    done = sum(name in found.captions for name in names)
    with ProgressBar("describe", total=len(names), unit="image", start=done) as bar:
        for ids in _answers(program, batches, _rows(settings)):
            numbers = held.popleft()
            texts = {number: vocabulary.text(row) for number, row in zip(numbers, ids.tolist(), strict=True)}
            for number in [number for number, text in texts.items() if not text]:
                broken.leave_out(number, len(names), f"{images / names[number]} got an empty caption")
            found.add({names[number]: text for number, text in texts.items() if text})
            done += len(texts)
            bar.update(done)
    found.publish(names)
    log.info("describe: %d captions in %s", sum(name in found.captions for name in names), images / METADATA[0])


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    settings, images = config.describe, _images(config)
    _check_settings(config)
    vocabulary = _vocabulary(settings)
    module = understanding_files.network_of(
        understanding_files.open_understanding(settings.weights),
        placeholder_id=vocabulary.image_placeholder_id,
        dtype=settings.dtype,
        source=settings.weights,
    )
    if vocabulary.size > module.vocabulary_size:
        raise RearError(
            f"{vocabulary.path} has {vocabulary.size} tokens, and {settings.weights} knows {module.vocabulary_size}: "
            "give the vocabulary of that network."
        )
    _question(settings, module, vocabulary)
    _names(images)
    refuse_other(workdir / FOLDER / images.name, images, _recipe(config, vocabulary))


def _check_settings(config: ConfigDict) -> None:
    settings = config.describe
    if not settings.question.strip():
        raise RearError("config.describe.question is empty: ask something about an image.")
    Broken("", config.data.max_broken_share)


def _images(config: ConfigDict) -> Path:
    """The folder of the images; raises RearError where there is none, or nothing can be written there."""
    images = Path(config.describe.images).expanduser()
    if not config.describe.images or not images.is_dir():
        raise RearError(f"config.describe.images = {config.describe.images!r} is no folder: name that of your images.")
    if not os.access(images, os.W_OK):
        raise RearError(f"{images} cannot be written, and metadata.jsonl must lie there: change its permissions.")
    return images.resolve()


def _names(images: Path) -> list[str]:
    """The images of a folder and of the folders in it, sorted; raises RearError where there are none."""
    names = sorted(image_states(images))
    if not names:
        raise RearError(f"{images} holds no images: name the folder of your images in config.describe.images.")
    return names


def _vocabulary(settings: ConfigDict) -> JanusVocabulary:
    """Raises RearError where weights or vocabulary are missing, or the vocabulary is another one."""
    weights = places.place(settings.weights)
    if not settings.weights or not weights.exists():
        raise RearError(
            f"config.describe.weights = {settings.weights!r} does not exist: name the checkpoint of Janus-Pro, or its "
            "folder."
        )
    return JanusVocabulary(settings.vocabulary or (weights if weights.is_dir() else weights.parent))


def _recipe(config: ConfigDict, vocabulary: JanusVocabulary) -> dict[str, Any]:
    """All that decides the captions but the weights."""
    settings = config.describe
    recipe = {name: settings[name] for name in ("question", "max_tokens", "temperature", "top_p", "dtype")}
    drawn = {"seed": config.seed} if settings.temperature else {}
    return recipe | drawn | {"images": str(_images(config)), "vocabulary": vocabulary.fingerprint}


def _question(settings: ConfigDict, module: Understanding, vocabulary: JanusVocabulary) -> np.ndarray:
    """Ids [T] of the question about an image; raises RearError where it leaves no room for an answer."""
    ids = np.array(vocabulary.question(settings.question, module.num_patches), np.int32)
    if len(ids) + settings.max_tokens > CONTEXT:
        raise RearError(
            f"config.describe.question takes {len(ids)} tokens with its image, and config.describe.max_tokens = "
            f"{settings.max_tokens}: together {CONTEXT} at most; shorten it."
        )
    return ids


def _rows(settings: ConfigDict) -> int:
    """Images that all devices describe at once."""
    return settings.batch_size * jax.local_device_count()


def _program(
    config: ConfigDict, module: Understanding, params: Any, vocabulary: JanusVocabulary
) -> Callable[[Batch], jax.Array]:
    """A batch of images -> ids [B, M] of their captions; one compiled program for all batches."""
    settings = config.describe
    question = _question(settings, module, vocabulary)
    answering = Answering(vocabulary.end_id, settings.max_tokens, settings.temperature, settings.top_p)

    @jax.jit
    def describe(params, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(config.seed), batch["number"])
        ids = jnp.broadcast_to(question, (len(keys), len(question)))
        mask, pixels = jnp.ones_like(ids, bool), normalised(batch["image"])
        return answer(module, params, pixels, ids, mask, keys, answering, wanted=batch["wanted"])

    return functools.partial(describe, local_devices.copied(params))


def _batches(
    images: Path,
    names: Sequence[str],
    done: Collection[str],
    rows: int,
    size: int,
    broken: Broken,
    held: deque[list[int]],
) -> Iterator[Batch]:
    """Images that have no caption yet, so many at a time; the numbers of those in each batch are put into `held`.

    A batch never has images of another stretch of the names, so that it is the same after a killed run.
    """

    def read(number: int) -> np.ndarray | RearError:
        try:
            return _square(images, names[number], size)
        except RearError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(names), rows):
            numbers = [n for n in range(start, min(start + rows, len(names))) if names[n] not in done]
            read_now = dict(zip(numbers, pool.map(read, numbers), strict=True))
            for number, error in read_now.items():
                if isinstance(error, RearError):
                    broken.leave_out(number, len(names), str(error))
            good = {number: image for number, image in read_now.items() if not isinstance(image, RearError)}
            if good:
                held.append(list(good))
                yield {
                    "image": np.stack(list(good.values())),
                    "number": np.array(list(good), np.int32),
                    "wanted": np.ones(len(good), bool),
                }


def _square(images: Path, name: str, size: int) -> np.ndarray:
    """An image as the network wants it, in 8 bits; raises RearError where it is broken."""
    if not is_plain(name):
        raise RearError(f"{str(images / name)!a} has a name that metadata.jsonl cannot give; rename it")
    return on_a_square(decode(images / name, str(images / name)), size)


def _answers(program: Callable[[Batch], jax.Array], batches: Iterator[Batch], rows: int) -> Iterator[np.ndarray]:
    """Ids of the captions of each batch; nothing where there are no batches."""
    for first in itertools.islice(batches, 1):
        yield from local_devices.stream(program, itertools.chain([first], batches), size=rows)
