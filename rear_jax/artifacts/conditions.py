"""What a generator is conditioned on while it learns: classes, or captions by number.

Captions are features on disk, or tokens that the step itself turns into features.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts.text import TextReader, check_text_encoder, reads_in_step
from rear_jax.data.caption_shards import HEADER, read_header
from rear_jax.data.captions import open_captions
from rear_jax.data.sources import SplitFacts, facts_of, open_split, require_classes, split_facts
from rear_jax.data.sources.interface import ImageSource
from rear_jax.errors import RearError
from rear_jax.generators.interface import Tokens
from rear_jax.runtime import places

CAPTIONS = "config.captions_from"


def captions_folder(config: ConfigDict, workdir: Path, split: str) -> Path:
    """Where the features of the captions of a split are: in a folder of its name, or with those of the others."""
    folder = places.place(config.captions_from) if config.captions_from else workdir / "captions"
    return folder / split if (folder / split).is_dir() or not config.captions_from else folder


def open_conditions(
    config: ConfigDict,
    workdir: Path,
    generator: nn.Module,
    split: str,
    source: ImageSource | SplitFacts,
    reader: TextReader | None = None,
) -> Callable[[np.ndarray], Any]:
    """Labels [b] of a split -> what the generator is conditioned on: themselves, or the captions with these numbers.

    With a reader, of `reader_in_step`, they are the tokens of these captions.

    Raises RearError: the source has labels that are no classes or captions; captions cannot be read.
    """
    if not generators.takes_text(generator):
        require_classes(source, config.data.num_classes)
        return lambda labels: labels
    if reader:
        return _open_tokens(config, split, source, reader)
    place = str(captions_folder(config, workdir, split))
    if not config.captions_from and not places.place(place).exists():
        raise RearError(f"{place} does not exist: run --job=caption first, or name features in {CAPTIONS}.")
    captions = open_captions(place, option=CAPTIONS, length=generator.caption_length, dim=generator.caption_dim)
    if source.num_classes > len(captions):
        raise RearError(
            f"{source.name} ({split}) has labels up to {source.num_classes - 1}, {place} has {len(captions)} "
            "captions: an image's label is the number of its caption."
        )
    return captions.__getitem__


def _open_tokens(
    config: ConfigDict, split: str, source: ImageSource | SplitFacts, reader: TextReader
) -> Callable[[np.ndarray], Tokens]:
    """Labels [b] of a split -> the tokens of the captions with these numbers."""
    captions = open_split(config.data, split) if isinstance(source, SplitFacts) else source
    _require_texts(facts_of(captions), split)
    if source.num_classes > len(captions):
        raise RearError(
            f"{source.name} ({split}) has labels up to {source.num_classes - 1}, config.data.source has "
            f"{len(captions)} captions: an image's label is the number of its caption."
        )
    return lambda labels: reader.tokens([captions.caption(number) for number in labels.tolist()])


def _require_texts(facts: SplitFacts, split: str) -> None:
    if not facts.captioned:
        raise RearError(f"{facts.name} ({split}) has no captions: give config.data.source a set that has them.")


def text_encoder_of(config: ConfigDict, workdir: Path, generator: nn.Module, reader: TextReader | None = None) -> str:
    """Fingerprint of the encoder of the training captions; '' for classes, or if unknown."""
    if reader:
        return reader.fingerprint
    header = captions_folder(config, workdir, config.data.train_split) / HEADER
    return read_header(header).encoder if generators.takes_text(generator) and header.is_file() else ""


def check_conditions(
    config: ConfigDict,
    workdir: Path,
    generator: nn.Module,
    split: str,
    source: ImageSource | SplitFacts,
    before: Collection[str],
) -> None:
    """Raises RearError where `open_conditions` will, unless a job before makes the captions."""
    if reads_in_step(config, generator):
        check_text_encoder(config, workdir, generator, before)
        _require_texts(split_facts(config.data, split), split)
        return
    if "caption" not in before or not generators.takes_text(generator):
        open_conditions(config, workdir, generator, split, source)


def with_conditions(stream: Any, conditions: Callable[[np.ndarray], Any]) -> Iterator[dict[str, Any]]:
    """The batches of a stream with 'condition' beside 'label'."""
    try:
        for batch in stream:
            yield batch | {"condition": conditions(batch["label"])}
    finally:
        stream.close()
