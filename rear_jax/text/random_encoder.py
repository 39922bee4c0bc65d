"""A small text encoder from nothing: the words of the captions as its vocabulary, and random weights.

It is for experiments that need no file. Its features are those of a random network: they tell captions with other words
or another order of words apart, and a generator learns what they stand for. Its files are like those of the published
encoders, so that everything else treats it like them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rear_jax.errors import RearError
from rear_jax.runtime.atomic import atomic_file
from rear_jax.runtime.extras import needed
from rear_jax.text.t5 import T5Encoder
from rear_jax.text.t5_files import torch_name
from rear_jax.text.vocabulary import SPECIAL
from rear_jax.weights import safetensors_file

if TYPE_CHECKING:
    import tokenizers

WEIGHTS, VOCABULARY = "model.safetensors", "tokenizer.json"
LEAST = {"depth": 1, "heads": 1, "head_size": 1, "mlp_width": 1, "vocabulary_size": 4}


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raises RearError where a size is too small; they are named as the attributes of `T5Encoder`."""
    for name, least in LEAST.items():
        if sizes[name] < least:
            raise RearError(f"config.text.{name} = {sizes[name]}: an encoder that is made here has at least {least}.")


def make(folder: Path, captions: Iterable[str], sizes: Mapping[str, int], *, seed: int) -> None:
    """Writes `model.safetensors` and `tokenizer.json` into a folder; the same arguments give the same files.

    Args:
      folder: made if it does not exist.
      captions: whose most frequent words are the vocabulary; case does not matter.
      sizes: attributes of `T5Encoder`. `vocabulary_size` counts T5's three special tokens; words beyond are unknown.
      seed: of the weights.

    Raises RearError: a size is too small.
    """
    check_sizes(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / VOCABULARY) as temporary:
        temporary.write_text(words_of(captions, sizes["vocabulary_size"]).to_str())
    module = T5Encoder(**sizes, dtype=jnp.float32)
    text = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    params = jax.jit(module.init)(jax.random.key(seed), *text)["params"]
    safetensors_file.save(folder / WEIGHTS, params, torch_name)  # last: an encoder is there when its weights are


def words_of(captions: Iterable[str], size: int) -> "tokenizers.Tokenizer":
    """A vocabulary of at most `size` words and marks of punctuation, the most frequent ones of captions."""
    with needed("text"):
        import tokenizers
        from tokenizers import models, normalizers, pre_tokenizers, trainers
    vocabulary = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    vocabulary.normalizer = normalizers.Lowercase()
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    vocabulary.train_from_iterator(captions, trainer)
    return vocabulary
