"""CLIP's vocabulary: texts to ids by byte-level BPE, from the published files (arXiv:2103.00020).

A text is repaired by `ftfy`, freed of HTML escapes, its blanks are joined, and it becomes lower case. It is then cut
into words, runs of letters, single digits and runs of other signs, and pairs of the bytes in each are merged in the
order of the file; the last byte of a word is marked with `</w>`. All CLIPs here have the same vocabulary.
"""

import gzip
import html
import itertools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.extras import needed

CONTEXT_LENGTH = 77  # positions of a text
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
MERGES = 48_894  # of the published lists that CLIP reads; what follows is of another vocabulary
MOST_BYTES = 32 * 2**20  # of an unzipped list of merges; the published one has a tenth

Merges = list[tuple[str, str]]  # pairs in the order in which they are merged


class CLIPVocabulary:
    """Texts to ids.

    Attributes:
      size: number of ids; the last one is the end of a text.
      start, end: ids that stand before and after each text.
      context_length: T, positions of a text.
    """

    def __init__(self, ids: Mapping[str, int], merges: Merges, *, source: str, context_length: int = CONTEXT_LENGTH):
        """Makes the vocabulary of a file, see `load`.

        Args:
          ids: of each piece, 0 to `size` - 1.
          merges: pairs of pieces.
          source: how an error message calls the file.
          context_length: T.

        Raises RearError: the ids are not those of a CLIP, or a merge has a piece without an id.
        """
        with needed("text"):
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        check(ids, merges, source)
        self.size, self.start, self.end, self.context_length = len(ids), ids[START], ids[END], context_length
        self._pieces = Tokenizer(models.BPE(dict(ids), merges, end_of_word_suffix=END_OF_WORD))
        self._pieces.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def encode(self, texts: Sequence[str]) -> Int[np.ndarray, "B T"]:
        """Ids of texts, int32: start, pieces, end, then 0. What is too long is cut; the end stays.

        Start and end written out in a text are plain signs.
        """
        found = np.zeros((len(texts), self.context_length), np.int32)
        pieces = self._pieces.encode_batch([clean(text) for text in texts], add_special_tokens=False)
        for row, of_text in zip(found, pieces, strict=True):
            ids = [self.start, *of_text.ids[: self.context_length - 2], self.end]
            row[: len(ids)] = ids
        return found


def clean(text: str) -> str:
    """Repairs a text: encoding, HTML escapes, blanks; in lower case."""
    with needed("text"):
        import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def load(path: str, *, context_length: int = CONTEXT_LENGTH) -> CLIPVocabulary:
    """The vocabulary of a published file.

    Args:
      path: `tokenizer.json`; or `vocab.json` or `merges.txt` with the other one beside it; or a folder with these; or
        OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
      context_length: T, positions of a text.

    Raises RearError: nothing usable is at `path`, or it is damaged.
    """
    file = _located(places.place(path))
    if file.name.endswith(".gz"):
        merges = merges_of(_unzip(file), str(file))
        ids = ids_of(merges)
    elif file.name == "vocab.json":
        ids = _json(file)
        merges = merges_of(_read(file.with_name("merges.txt")), str(file.with_name("merges.txt")))
    else:
        model = _json(file).get("model")
        if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
            raise RearError(f"{file} has no model with vocab and merges; give the tokenizer.json of a CLIP.")
        ids, merges = model["vocab"], _pairs(model["merges"], str(file))
    return CLIPVocabulary(ids, merges, source=str(file), context_length=context_length)


def ids_of(merges: Merges) -> dict[str, int]:
    """The ids that a list of merges implies: bytes, bytes at the end of a word, merged pairs, start and end."""
    signs = list(byte_signs())
    pieces = [*signs, *(sign + END_OF_WORD for sign in signs), *map("".join, merges), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def byte_signs() -> list[str]:
    """The visible sign that stands for each byte in the files, in the order of their ids.

    Bytes that are visible in Latin-1 stand for themselves and come first; the others follow as U+0100, U+0101, ….
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in visible] + [chr(256 + number) for number in range(256 - len(visible))]


def merges_of(text: str, source: str) -> Merges:
    """The merges of a list that has a line with its version, and then a pair in each line.

    Raises RearError: there is no such line first, or another one is no pair.
    """
    first, *lines = text.strip().split("\n")
    if "#version" not in first:
        raise RearError(f"{source} does not begin with a line #version, as a list of merges does; fetch it again.")
    return _pairs(lines[:MERGES], source)


def check(ids: Any, merges: Merges, source: str) -> None:
    """Raises RearError unless ids and merges are whole and end with start and end."""
    numbers = list(ids.values()) if isinstance(ids, dict) else []
    if not numbers or any(type(number) is not int for number in numbers) or set(numbers) != set(range(len(numbers))):
        raise RearError(f"{source}: its ids are not 0, 1, 2, …; it is no CLIP's or was changed: fetch it again.")
    if (ids.get(START), ids.get(END)) != (len(ids) - 2, len(ids) - 1):
        raise RearError(f"{source}: {START} and {END} are not its last ids; give the vocabulary of a CLIP.")
    pieces = itertools.chain(byte_signs(), (sign + END_OF_WORD for sign in byte_signs()), *merges, map("".join, merges))
    if (missing := next((piece for piece in pieces if piece not in ids), None)) is not None:
        raise RearError(f"{source} has no id for {missing!r}: give ids and merges of the same CLIP.")


def _located(path: Path) -> Path:
    """The file to begin with; raises RearError where there is none."""
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    files = [path / name for name in ("tokenizer.json", "vocab.json")] if path.is_dir() else [path]
    if (found := next((file for file in files if file.is_file()), None)) is None:
        raise RearError(
            f"there is no CLIP vocabulary at {path}: give tokenizer.json, vocab.json beside merges.txt, or "
            "bpe_simple_vocab_16e6.txt.gz."
        )
    return found


def _pairs(lines: Any, source: str) -> Merges:
    """Merges from lines "a b", or from lists [a, b] as newer files have them."""
    if not isinstance(lines, list):
        raise RearError(f"{source}: its merges are no list; give the vocabulary of a CLIP.")
    pairs = [tuple(line.split(" ")) if isinstance(line, str) else line for line in lines]
    for number, pair in enumerate(pairs):
        whole = isinstance(pair, list | tuple) and len(pair) == 2
        if not whole or not all(isinstance(piece, str) and piece for piece in pair):
            raise RearError(f"{source}: merge {number} is {lines[number]!r}, not a pair; fetch the file again.")
    return [(first, second) for first, second in pairs]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RearError(f"{file} cannot be read as text ({error}); fetch it again.") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise RearError(f"{file} is no JSON ({error}); fetch it again.") from None
    if not isinstance(found, dict):
        raise RearError(f"{file} is no JSON object; give the vocabulary of a CLIP.")
    return found


def _unzip(file: Path) -> str:
    try:
        with gzip.open(places.local(file), "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes unzipped")
        return content.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise RearError(f"{file} is no list of merges ({error}); fetch it again.") from None
