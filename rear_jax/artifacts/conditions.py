"""What a generator is conditioned on while it learns: classes, or captions by number."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.data.captions import CaptionFile
from rear_jax.data.images import ImageSource, SplitFacts, require_classes
from rear_jax.errors import RearError

CAPTIONS = "config.captions_from"


def captions_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where the features of the captions are."""
    return Path(config.captions_from) if config.captions_from else workdir / "captions"


def open_conditions(
    config: ConfigDict, workdir: Path, generator: nn.Module, sources: Mapping[str, ImageSource | SplitFacts]
) -> Callable[[np.ndarray], Any]:
    """Labels [b] -> what the generator is conditioned on: themselves, or the captions with these numbers.

    Raises RearError: of the sources, by split, one has labels that are no classes or captions; captions cannot be read.
    """
    if not generators.takes_captions(generator):
        for source in sources.values():
            require_classes(source, config.data.num_classes)
        return lambda labels: labels
    place = str(captions_folder(config, workdir))
    captions = CaptionFile(place, option=CAPTIONS, length=generator.caption_length, dim=generator.caption_dim)
    for split, source in sources.items():
        if source.num_classes > len(captions):
            raise RearError(
                f"{source.name} ({split}) has labels up to {source.num_classes - 1}, {place} has {len(captions)} "
                "captions: an image's label is the number of its caption."
            )
    return captions.__getitem__


def with_conditions(stream: Any, conditions: Callable[[np.ndarray], Any]) -> Iterator[dict[str, Any]]:
    """The batches of a stream with 'condition' beside 'label'."""
    try:
        for batch in stream:
            yield batch | {"condition": conditions(batch["label"])}
    finally:
        stream.close()
