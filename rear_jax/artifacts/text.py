"""The text encoder of an experiment: files of the user's, or a small one that `--job=caption` makes."""

from collections.abc import Collection
from pathlib import Path

import flax.linen as nn
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.text import random_encoder, t5_files
from rear_jax.text.encoder import TextEncoder
from rear_jax.text.t5 import check_dtype
from rear_jax.text.vocabulary import T5Vocabulary
from rear_jax.weights.shards import open_weights

VOCABULARIES = ("tokenizer.json", "spiece.model")  # what is looked for beside an encoder


def encoder_folder(workdir: Path) -> Path:
    """The encoder that `--job=caption` makes where the config names none."""
    return workdir / "text_encoder"


def open_text_encoder(config: ConfigDict, workdir: Path, generator: nn.Module) -> TextEncoder:
    """The encoder, read whole.

    Raises RearError: a file is missing or damaged, or the generator takes other features.
    """
    weights, vocabulary = _files(config, workdir)
    encoder = TextEncoder(weights, vocabulary, length=text_length(config, generator), dtype=config.text.dtype)
    _check_width(encoder.module.width, weights, generator)
    return encoder


def check_text_encoder(config: ConfigDict, workdir: Path, generator: nn.Module, before: Collection[str]) -> None:
    """Raises RearError where headers tell that `open_text_encoder` will fail, unless a job before makes the encoder."""
    text_length(config, generator)
    check_dtype(config.text.dtype)
    if "caption" in before and not config.text.encoder:
        return
    weights, vocabulary = _files(config, workdir)
    T5Vocabulary(vocabulary)
    _check_width(t5_files.sizes(open_weights(weights), source=weights)["width"], weights, generator)


def text_length(config: ConfigDict, generator: nn.Module) -> int:
    """Tokens of a caption; raises RearError where the generator has no room for so many."""
    length = config.text.length or generator.caption_length
    if not 1 <= length <= generator.caption_length:
        raise RearError(
            f"config.text.length = {length}: the generator has room for 1 to {generator.caption_length} tokens "
            "(config.model.caption_length)."
        )
    return length


def _files(config: ConfigDict, workdir: Path) -> tuple[str, str]:
    """Weights and vocabulary."""
    settings, made = config.text, encoder_folder(workdir)
    if not settings.encoder and not (made / random_encoder.WEIGHTS).exists():
        raise RearError(
            "config.text.encoder = '' and there is none in the workdir: name the files of T5, or run --job=caption, "
            "which makes a small one."
        )
    weights = Path(settings.encoder or made / random_encoder.WEIGHTS)
    if not weights.exists():
        raise RearError(f"config.text.encoder = {settings.encoder!r} does not exist: name the file or folder of T5.")
    if settings.vocabulary:
        return str(weights), settings.vocabulary
    folder = weights if weights.is_dir() else weights.parent
    found = [folder / name for name in VOCABULARIES if (folder / name).exists()]
    if not found:
        raise RearError(f"config.text.vocabulary = '' and {folder} has no {' or '.join(VOCABULARIES)}: name the file.")
    return str(weights), str(found[0])


def _check_width(width: int, weights: str, generator: nn.Module) -> None:
    if width != generator.caption_dim:
        raise RearError(
            f"{weights} gives features of {width} numbers, the generator takes {generator.caption_dim}: use the "
            "encoder that it was trained with, or set config.model.caption_dim."
        )
