"""The vocabulary of T5: texts to token ids, by either of its two published files.

Both hold the same unigram model (Kudo 2018, arXiv:1804.10959). `tokenizer.json` is read by the package `tokenizers`,
`spiece.model` by `sentencepiece`. Where a text names a special token, such as </s>, the first gives that token and the
second plain text; cleaning takes such names out of captions.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.extras import needed

LENGTH = 120  # tokens of a caption, with the end token, in LlamaGen
PAD, END, UNKNOWN = 0, 1, 2
SPECIAL = {"<pad>": PAD, "</s>": END, "<unk>": UNKNOWN}

Split = Callable[[str], list[int]]  # a text -> its ids, without the end token


class T5Vocabulary:
    """Token ids of texts.

    Attributes:
      path: of the file.
      size: ids are 0..size-1; an encoder may have more rows.
      fingerprint: sixteen hexadecimal digits that name the content of the file.
    """

    def __init__(self, path: str | Path):
        """Reads `tokenizer.json` or `spiece.model`; which of them it is, its content tells.

        Raises RearError: the file is missing, damaged, or the vocabulary of another network.
        """
        self.path = places.local(path)
        if not self.path.is_file():
            raise RearError(f"There is no vocabulary {path}: give T5's tokenizer.json or spiece.model.")
        content = self.path.read_bytes()
        read = _read_json if content.lstrip()[:1] == b"{" else _read_sentencepiece
        self._split, self.size, special = read(content, self.path)
        if special != SPECIAL:
            raise RearError(
                f"{path} is the vocabulary of another network (special tokens {special}, T5 has {SPECIAL}): give T5's."
            )
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def encode(
        self, texts: Sequence[str], length: int = LENGTH
    ) -> tuple[Int[np.ndarray, "B length"], Bool[np.ndarray, "B length"]]:
        """Ids of texts, each with the end token after it, cut to `length` with that token, padded on the right.

        Args:
          texts: B of them; an empty one is the end token alone.
          length: tokens, at least 1.

        Returns:
          ids int32, 0 on padding, and the mask that is True on tokens.

        Raises RearError: `length` leaves no room for the end token.
        """
        if length < 1:
            raise RearError(f"A text of {length} tokens has no room for the end token: give a length of 1 or more.")
        ids = np.full((len(texts), length), PAD, np.int32)
        mask = np.zeros((len(texts), length), bool)
        for row, visible, text in zip(ids, mask, texts, strict=True):
            tokens = [*self._split(in_unicode(text))[: length - 1], END]
            row[: len(tokens)], visible[: len(tokens)] = tokens, True
        return ids, mask


def _read_json(content: bytes, path: Path) -> tuple[Split, int, dict[str, int | None]]:
    """How `tokenizer.json` splits a text, its size, and the ids of its special tokens."""
    with needed("text"):
        import tokenizers
    try:
        model = tokenizers.Tokenizer.from_str(content.decode())
        model.encode("\ue000")  # fails where the model has no token for what it does not know
    except Exception as error:  # the package raises no other class
        raise _damaged(path, error) from error
    model.no_truncation()
    model.no_padding()
    size = max(model.get_vocab().values(), default=-1) + 1
    special = {token: model.token_to_id(token) for token in SPECIAL}
    return lambda text: model.encode(text, add_special_tokens=False).ids, size, special


def _read_sentencepiece(content: bytes, path: Path) -> tuple[Split, int, dict[str, int | None]]:
    """The same of `spiece.model`."""
    if not content:
        raise _damaged(path, "it is empty")
    with needed("text"):
        import sentencepiece
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise _damaged(path, error) from error
    special = {"<pad>": model.pad_id(), "</s>": model.eos_id(), "<unk>": model.unk_id()}
    return model.encode, model.get_piece_size(), special


def in_unicode(text: str) -> str:
    """The text with U+FFFD for each half of a character that stands alone, which has no UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _damaged(path: Path, why: object) -> RearError:
    told = " ".join(str(why).split())
    return RearError(f"{path} is no whole vocabulary ({told}): fetch T5's tokenizer.json or spiece.model again.")
