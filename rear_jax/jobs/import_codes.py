"""`--job=import`: codes that others have published become code files of this project."""

import contextlib
import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rear_jax import artifacts
from rear_jax.data.codes import open_codes, write_codes
from rear_jax.data.codes_header import HEADER, CodesHeader
from rear_jax.data.imports import Limits, check_import, open_import
from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.progress import ProgressBar

log = logging.getLogger(__name__)

CLASSES = "classes.json"  # beside the code files: how many records each class has


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/codes`; a killed run goes on with the first shard that is missing."""
    folder = artifacts.codes_folder(config, workdir)
    path = _source(config)
    with _of_these_codes():
        tokenizer = artifacts.load_tokenizer(config, workdir)
    limits = _limits(config, tokenizer)
    source = open_import(path, limits)
    header = CodesHeader(
        num_images=source.num_images,
        num_augmentations=source.num_views,
        augmentation="imported",
        codes_per_image=limits.codes_per_image,
        codebook_size=limits.codebook_size,
        image_size=config.data.image_size,
        num_classes=limits.num_classes,
        fingerprint=tokenizer.fingerprint,
        source=path.name,
        split=source.description,
        num_shards=min(config.codes.num_shards, source.num_images),
    )
    log.info(
        "import: %s does not say which tokenizer made it; the config's word is taken that it was %s (%s)",
        path,
        tokenizer.origin,
        tokenizer.fingerprint,
    )
    with ProgressBar("import", total=source.num_images, unit="image") as bar:
        write_codes(folder, header, source.read, progress=lambda done, _: bar.update(done))
    if (folder / HEADER).is_file():  # else other processes are still writing
        _count_classes(folder)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    path = _source(config)
    with _of_these_codes():
        artifacts.check_tokenizer(config, workdir, before)
    check_import(path, _limits(config, artifacts.outline_tokenizer(config)))


def _source(config: ConfigDict) -> Path:
    if not config.import_codes.source:
        raise RearError("config.import_codes.source is not given: name a .jsonl file, a folder or an .npz file.")
    return places.place(config.import_codes.source)


def _limits(config: ConfigDict, tokenizer: artifacts.Tokenizer) -> Limits:
    return Limits(tokenizer.num_codes, tokenizer.module.codebook_size, config.data.num_classes)


@contextlib.contextmanager
def _of_these_codes() -> Iterator[None]:
    """Says of a tokenizer that cannot be had what it is needed for."""
    try:
        yield
    except RearError as error:
        raise RearError(
            f"config.tokenizer_from must give the tokenizer that made the codes to import: {error}"
        ) from None


def _count_classes(folder: Path) -> None:
    """Writes `classes.json` and logs its summary."""
    counts = open_codes(folder).class_counts()
    write_json(folder / CLASSES, {"records": {str(label): int(n) for label, n in enumerate(counts)}})
    empty = np.flatnonzero(counts == 0)
    smallest, largest = int(np.argmin(counts)), int(np.argmax(counts))
    log.info(
        "import: %d records in %s; smallest class %d with %d, largest %d with %d; %d classes without any%s",
        counts.sum(),
        folder,
        smallest,
        counts[smallest],
        largest,
        counts[largest],
        len(empty),
        f", such as {', '.join(map(str, empty[:10]))}" if len(empty) else "",
    )
