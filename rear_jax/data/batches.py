"""Batches of images and of codes: shuffled without end for training, or in order for tokenizing and evaluating.

The training streams obey one law. Batch k depends on the data, the sizes and the seed alone: not on the number of
threads or processes, and not on the step at which a run began. So a run is resumed by its step number, and the
processes' shares laid end to end are the batch that one process would have.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import SupportsIndex

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.codes import Codes
from rear_jax.data.crops import AUGMENTATIONS, RANDOM_VIEWS
from rear_jax.data.sources.interface import ImageSource, spread
from rear_jax.errors import RearError

Batch = dict[str, np.ndarray]


def image_batches(
    source: ImageSource,
    *,
    image_size: int,
    augment: str,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
) -> grain.DatasetIterator[Batch]:
    """Shuffled batches without end; each epoch visits every image once in an order of its own.

    Args:
      source: the images.
      image_size: S, side of the square images in pixels; images that have it already are not resampled.
      augment: a key of `RANDOM_VIEWS`: 'none', 'flip', or 'crop_flip' (which always resamples).
      batch_size: B, images per step over all processes.
      seed: in [0, 2**32).
      start_step: the first step whose batch is wanted.
      process_index: which share of each batch this process reads.
      process_count: P, over how many processes a batch is spread.
      num_threads: batches that are made ahead in parallel; 0 makes each one when it is asked for.

    Returns:
      An iterator (close it by `close()`) of {'image': uint8 [B/P, S, S, 3], 'label': int32 [B/P], 'index': int32
      [B/P]}, the last counting the images of the source.

    Raises RearError: `augment` is unknown or B does not divide; while iterating, an image cannot be read.
    """
    view = random_view_of(augment)

    def numbered(index: int, element: tuple[np.ndarray, int]) -> tuple[int, np.ndarray, int]:
        return index, *element

    def random_view(element: tuple[int, np.ndarray, int], rng: np.random.Generator) -> dict[str, np.ndarray | np.int32]:
        index, image, label = element
        return {"image": view(image, image_size, rng), "label": np.int32(label), "index": np.int32(index)}

    numbers = grain.MapDataset.source(source).map_with_index(numbered)
    sequence = numbers.seed(seed).shuffle().repeat().random_map(random_view)
    share = _Share(batch_size, start_step, process_index, process_count)
    return _iterate(grain.MapDataset.source(_ImageRows(sequence, share)).batch(share.rows), num_threads)


def random_view_of(augment: str) -> Callable[[np.ndarray, int, np.random.Generator], np.ndarray]:
    """The random view that a training job makes of each image; raises RearError where there is none of that name."""
    return RANDOM_VIEWS[_known(augment, tuple(RANDOM_VIEWS))]


def training_stream(
    source: ImageSource, config: ConfigDict, settings: ConfigDict, augment: str
) -> Callable[[int], grain.DatasetIterator[Batch]]:
    """start step -> this process's share of the `image_batches` of a training job; `settings` are of its loop."""
    return lambda start: image_batches(
        source,
        image_size=config.data.image_size,
        augment=augment,
        batch_size=settings.batch_size,
        seed=config.seed,
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def ordered_batches(
    source: ImageSource,
    *,
    image_size: int,
    batch_size: int,
    start: int = 0,
    stop: int | None = None,
    augmentation: str = "center",
    num_threads: int = 8,
) -> grain.DatasetIterator[Batch]:
    """Images [start, stop) in order, each in all views of an augmentation; the last batch holds what is left.

    Args:
      source: the images.
      image_size: S, side of the square views in pixels.
      batch_size: b, images (not views) per batch.
      start: first image.
      stop: one past the last image; None for the end of the source.
      augmentation: a key of `AUGMENTATIONS`, A views per image.
      num_threads: as in `image_batches`.

    Returns:
      An iterator of {'image': uint8 [b A, S, S, 3], 'label': int32 [b A], 'augmentation': int32 [b A]}, the views of
      one image side by side.

    Raises RearError: `augmentation` is unknown; while iterating, an image cannot be read.
    """
    count, views = AUGMENTATIONS[_known(augmentation, tuple(AUGMENTATIONS))]

    def all_views(element: tuple[np.ndarray, int]) -> Batch:
        image, label = element
        return {
            "image": np.stack(views(image, image_size)),
            "label": np.full(count, label, np.int32),
            "augmentation": np.arange(count, dtype=np.int32),
        }

    batches = grain.MapDataset.source(source)[start:stop].map(all_views).batch(batch_size).map(_merge_views)
    return _iterate(batches, num_threads)


def code_batches(
    codes: Codes,
    *,
    batch_size: int,
    seed: int,
    num_images: int = 0,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Shuffled batches of codes without end; each epoch visits every record, that is every view, once.

    Args:
      codes: an open folder of codes.
      batch_size: B, sequences per step over all processes.
      seed: not negative.
      num_images: how many images are read, evenly spread, each in all its views; 0 for all.
      start_step, process_index, process_count: as in `image_batches`.

    Returns:
      An iterator (close it by `close()`) of {'codes': int32 [B/P, N], 'label': int32 [B/P]}, read two batches ahead.

    Raises RearError: B does not divide among the processes; while iterating, a record is damaged.
    """
    header, views = codes.header, codes.header.num_augmentations
    images = spread(header.num_images, num_images or header.num_images)
    records = (images[:, None] * views + np.arange(views)).reshape(-1)
    batches = _CodeBatches(codes, records, seed, _Share(batch_size, start_step, process_index, process_count))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def image_shapes(batch_size: int, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `image_batches` over all processes."""
    numbers = jax.ShapeDtypeStruct((batch_size,), np.int32)
    images = jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), np.uint8)
    return {"image": images, "label": numbers, "index": numbers}


def code_shapes(batch_size: int, num_codes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of `code_batches` over all processes."""
    codes = jax.ShapeDtypeStruct((batch_size, num_codes), np.int32)
    return {"codes": codes, "label": jax.ShapeDtypeStruct((batch_size,), np.int32)}


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which places of the endless global sequence this process reads.

    The batch of step k is places [k B, (k + 1) B); process p of P has the p-th of P equal runs of it.
    """

    batch_size: int
    start_step: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise RearError(
                f"batch_size {self.batch_size} does not divide among {self.process_count} processes; choose a multiple"
            )

    @property
    def rows(self) -> int:
        """Places per step."""
        return self.batch_size // self.process_count

    def first_place(self, step: int) -> int:
        """Where this process's run begins, `step` steps after the first one wanted."""
        return (self.start_step + step) * self.batch_size + self.process_index * self.rows


class _ImageRows:
    """A process's rows of all its batches, one after the other."""

    def __init__(self, sequence: grain.MapDataset, share: _Share):
        self._sequence = sequence
        self._share = share

    def __len__(self) -> int:
        return sys.maxsize // self._share.batch_size

    def __getitem__(self, index: SupportsIndex) -> Batch:
        step, row = divmod(int(index), self._share.rows)
        return self._sequence[self._share.first_place(step) + row]


class _CodeBatches:
    """A process's batches of codes, by step.

    The order comes from one permutation per epoch: grain's shuffle works record by record, at some 15 microseconds
    each, which is longer than reading the record takes.
    """

    def __init__(self, codes: Codes, records: np.ndarray, seed: int, share: _Share):
        self._codes = codes
        self._records = records  # those that are read
        self._share = share
        self._epoch_order = functools.lru_cache(maxsize=2)(functools.partial(_epoch_order, len(records), seed))

    def __len__(self) -> int:
        return sys.maxsize // self._share.batch_size

    def __getitem__(self, index: SupportsIndex) -> Batch:
        first = self._share.first_place(int(index))
        epochs, places = np.divmod(np.arange(first, first + self._share.rows), len(self._records))
        chosen = np.concatenate([self._epoch_order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        batch = self._codes.read(self._records[chosen])
        return {"codes": batch["codes"], "label": batch["label"]}


def _epoch_order(num_records: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of [0, num_records) that differs from epoch to epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_records)


def _merge_views(batch: Batch) -> Batch:
    """[b, A, ...] -> [b A, ...] in every entry."""
    return {name: array.reshape(-1, *array.shape[2:]) for name, array in batch.items()}


def _iterate(batches: grain.MapDataset, num_threads: int) -> grain.DatasetIterator[Batch]:
    # The buffer counts batches. One per thread keeps the threads busy without holding more of them in memory.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(batches.to_iter_dataset(options))


def _known(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise RearError(f"unknown augmentation {name!r}; the known ones are: {', '.join(known)}")
    return name
