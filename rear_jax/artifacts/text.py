"""What an experiment reads text with: a text encoder or, where the generator reads text itself, a vocabulary.

An encoder is from files of the user's, or a small one that is made here.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions, Tokens
from rear_jax.runtime import places
from rear_jax.text import random_encoder, t5_files
from rear_jax.text.encoder import TextEncoder, caption_features
from rear_jax.text.janus_vocabulary import JanusVocabulary
from rear_jax.text.t5 import T5Encoder, check_dtype
from rear_jax.text.vocabulary import T5Vocabulary
from rear_jax.weights.shards import open_weights

RANDOM = "random"  # as `config.text.encoder`
VOCABULARIES = ("tokenizer.json", "spiece.model")  # what is looked for beside an encoder


@dataclasses.dataclass(frozen=True)
class TextReader:
    """What makes the conditions of a generator of texts.

    Attributes:
      length: T, tokens of a text.
      params: weights of the encoder, on the host, {} if there is none; of an outline their shapes.
      condition: (params, Tokens [B, T]) -> what the generator is conditioned on, pure.
      tokens: texts -> Tokens [B, T] on the host; None in an outline.
      fingerprint: sixteen hexadecimal digits that name all that decides the conditions; '' in an outline.
    """

    length: int
    params: Any
    condition: Callable[[Any, Tokens], Any]
    tokens: Callable[[Sequence[str]], Tokens] | None = None
    fingerprint: str = ""

    def token_shapes(self, rows: int) -> Tokens:
        """Of so many texts."""
        shape = rows, self.length
        return Tokens(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool))

    def encode(self, texts: Sequence[str]) -> Any:
        """Conditions of texts, on the host. The weights stay on the device; each number of texts is compiled once."""
        return jax.device_get(self._program(self._placed, self.tokens(texts)))

    def encode_once(self, tokens: Tokens) -> Any:
        """Conditions, on the host. The weights are on the device for this call alone."""
        return jax.device_get(self._program(self.params, tokens))

    @functools.cached_property
    def _program(self) -> Any:
        return jax.jit(self.condition)

    @functools.cached_property
    def _placed(self) -> Any:
        return jax.device_put(self.params)


def open_text_reader(config: ConfigDict, workdir: Path, generator: nn.Module) -> TextReader:
    """What turns texts into conditions of a text-conditional generator, its files read whole.

    Raises RearError: as `open_text_encoder`, or as `open_vocabulary`.
    """
    if generators.reads_tokens(generator):
        vocabulary, length = open_vocabulary(config, generator), text_length(config, generator)

        def in_template(texts: Sequence[str]) -> Tokens:
            return Tokens(*vocabulary.encode(texts, length, cut=True))

        return TextReader(length, {}, _as_they_are, in_template, vocabulary.fingerprint)
    encoder = open_text_encoder(config, workdir, generator)

    def tokens(texts: Sequence[str]) -> Tokens:
        return Tokens(*encoder.tokens(texts))

    condition = _condition(encoder.module, config.text.dtype, generator.caption_length)
    return TextReader(encoder.length, encoder.params, condition, tokens, encoder.fingerprint)


def reader_in_step(config: ConfigDict, workdir: Path, generator: nn.Module) -> TextReader | None:
    """What a training step itself turns texts into conditions with; None for classes and for stored features.

    Raises RearError: as `open_text_reader`, and as `reads_in_step`.
    """
    return open_text_reader(config, workdir, generator) if reads_in_step(config, generator) else None


def outline_reader_in_step(config: ConfigDict, workdir: Path, generator: nn.Module) -> TextReader | None:
    """The same with shapes, which a plan needs; sizes are those of `config.text` as long as there is no file.

    Raises RearError: the file is no T5, or as `reads_in_step`.
    """
    if not reads_in_step(config, generator):
        return None
    length = text_length(config, generator)
    if generators.reads_tokens(generator):
        return TextReader(length, {}, _as_they_are)
    module, room = outline_text_encoder(config, workdir, generator), generator.caption_length
    return TextReader(length, t5_files.shapes(module), _condition(module, config.text.dtype, room))


def reads_in_step(config: ConfigDict, generator: nn.Module) -> bool:
    """Whether training steps make conditions of texts; raises RearError where stored features are given as well."""
    itself = generators.reads_tokens(generator)
    if not (itself or (generators.takes_captions(generator) and config.text.on_the_fly)):
        return False
    if config.captions_from:
        why = f"by config.model.name = {config.model.name!r}" if itself else "with config.text.on_the_fly"
        raise RearError(f"config.captions_from = {config.captions_from!r} is not read {why}: leave one of them out.")
    return True


def outline_text_encoder(config: ConfigDict, workdir: Path, generator: nn.Module) -> T5Encoder:
    """The network, by the header of its file, or by the sizes of `config.text` as long as there is none.

    Raises RearError: the file is no T5, or T5 does not compute in this dtype.
    """
    check_dtype(config.text.dtype)
    weights = _weights(config, workdir)
    sizes = t5_files.sizes(open_weights(str(weights)), source=str(weights)) if weights.exists() else None
    return T5Encoder(**(sizes or encoder_sizes(config, generator)), dtype=jnp.dtype(config.text.dtype))


def encoder_sizes(config: ConfigDict, generator: nn.Module) -> dict[str, int]:
    """Attributes of the `T5Encoder` that `config.text` describes."""
    return {"width": generator.caption_dim} | {name: config.text[name] for name in random_encoder.LEAST}


def encoder_folder(workdir: Path) -> Path:
    """Where `--job=caption` makes an encoder with random weights."""
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
    """Raises RearError where headers tell that `open_text_reader` will fail, unless a job before makes the encoder."""
    text_length(config, generator)
    if generators.reads_tokens(generator):
        open_vocabulary(config, generator)
        return
    check_dtype(config.text.dtype)
    if config.text.encoder == RANDOM and "caption" in before:
        random_encoder.check_sizes(encoder_sizes(config, generator))
        return
    weights, vocabulary = _files(config, workdir)
    T5Vocabulary(vocabulary)
    _check_width(t5_files.sizes(open_weights(weights), source=weights)["width"], weights, generator)


def open_vocabulary(config: ConfigDict, generator: nn.Module) -> JanusVocabulary:
    """The words of a generator that reads text itself.

    Raises RearError: there is no such file, or it is of another network.
    """
    place, pad_id = config.text.vocabulary, generator.pad_id
    if not place:
        raise RearError("config.text.vocabulary = '': name the tokenizer.json that was published with the generator.")
    vocabulary = JanusVocabulary(place)
    if vocabulary.pad_id != pad_id or vocabulary.size > generator.vocabulary_size:
        raise RearError(
            f"{place} has {vocabulary.size} tokens and pads with {vocabulary.pad_id}, the generator knows "
            f"{generator.vocabulary_size} (config.model.vocabulary_size) and pads with {pad_id} (config.model.pad_id): "
            "give the vocabulary of that generator, or set both."
        )
    return vocabulary


def text_length(config: ConfigDict, generator: nn.Module) -> int:
    """Tokens of a text; raises RearError where the generator has no room for so many."""
    option = "prompt_length" if generators.reads_tokens(generator) else "caption_length"
    room = getattr(generator, option)
    length = config.text.length or room
    if not 1 <= length <= room:
        raise RearError(
            f"config.text.length = {length}: the generator has room for 1 to {room} tokens (config.model.{option})."
        )
    return length


def _as_they_are(params: Any, tokens: Tokens) -> Tokens:
    return tokens


def _condition(module: T5Encoder, dtype: str, room: int) -> Callable[[Any, Tokens], Captions]:
    """Tokens to captions with room for so many tokens, in the precision of features that are stored."""

    def condition(params: Any, tokens: Tokens) -> Captions:
        features, mask = caption_features(module, params, *tokens)
        features = features.astype(dtype).astype(jnp.float32)
        missing = room - mask.shape[1]
        return Captions(jnp.pad(features, ((0, 0), (missing, 0), (0, 0))), jnp.pad(mask, ((0, 0), (missing, 0))))

    return condition


def _weights(config: ConfigDict, workdir: Path) -> Path:
    """Of the encoder, there or not."""
    if config.text.encoder == RANDOM:
        return encoder_folder(workdir) / random_encoder.WEIGHTS
    return places.place(config.text.encoder or "no encoder")


def _files(config: ConfigDict, workdir: Path) -> tuple[str, str]:
    """Weights and vocabulary."""
    settings, weights = config.text, _weights(config, workdir)
    if not settings.encoder:
        raise RearError(
            "config.text.encoder = '': name the file or folder of T5, or set 'random' and run --job=caption, which "
            "makes a small one."
        )
    if not weights.exists():
        made = f"and {weights} is not there: run --job=caption, which makes it"
        there = "does not exist: name the file or folder of T5"
        raise RearError(f"config.text.encoder = {settings.encoder!r} {made if settings.encoder == RANDOM else there}.")
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
