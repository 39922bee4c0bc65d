"""The vocabulary of Janus (arXiv:2501.17811): prompts to token ids, by the published `tokenizer.json`.

It is a byte-level BPE with added tokens, read by the package `tokenizers`. Janus was taught to draw after
`<|User|>: CAPTION\\n\\n<|Assistant|>:<begin_of_image>` behind the start token, with the blanks around a caption removed
and no system prompt. A batch is padded on the left, so that <begin_of_image> stands right before the first code.

A prompt may be a stranger's, so that a special token spelled out in it, such as <end_of_image>, is plain text here. In
the authors' code it becomes that token. Prompts without such names get the same ids from both.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.extras import needed
from rear_jax.text.vocabulary import in_unicode

if TYPE_CHECKING:
    import tokenizers

MOST_BYTES = 64 * 2**20  # of a file; the published ones have less than a tenth
MOST_TOKENS = 2**24  # of a vocabulary; the published ones have about 100 thousand
BAR = "\N{FULLWIDTH VERTICAL LINE}"
SPECIAL = {  # attribute -> the name of its token in the file
    "start_id": f"<{BAR}begin▁of▁sentence{BAR}>",
    "end_id": f"<{BAR}end▁of▁sentence{BAR}>",
    "pad_id": f"<{BAR}▁pad▁{BAR}>",
    "begin_of_image_id": "<begin_of_image>",
    "end_of_image_id": "<end_of_image>",
    "image_placeholder_id": "<image_placeholder>",
    "user_id": "<|User|>",
    "assistant_id": "<|Assistant|>",
}
FROM_JANUS = "give the tokenizer.json of Janus-Pro"
SHOWN = 60  # characters of a prompt in a message
ANSWERING = (  # what stands before a question about an image, and never before a caption
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language.\n\n"
)


class JanusVocabulary:
    """Token ids of prompts.

    Attributes:
      path: of the file.
      size: ids are 0..size-1; a network may have more rows.
      fingerprint: sixteen hexadecimal digits that name the content of the file.
      start_id, end_id, pad_id, begin_of_image_id, end_of_image_id, image_placeholder_id, user_id, assistant_id: of the
        tokens of `SPECIAL`.
    """

    start_id: int
    end_id: int
    pad_id: int
    begin_of_image_id: int
    end_of_image_id: int
    image_placeholder_id: int
    user_id: int
    assistant_id: int

    def __init__(self, path: str | Path):
        """Reads `tokenizer.json`, or that file in a folder.

        Raises RearError: the file is missing, too large, damaged, or the vocabulary of another network.
        """
        place = places.place(path)
        self.path = place / "tokenizer.json" if place.is_dir() else place
        content = _read(self.path)
        self._model = _model(content, self.path)
        for attribute, name in SPECIAL.items():
            setattr(self, attribute, self._model.token_to_id(name))
        self.size = max(self._model.get_vocab().values()) + 1
        if self.size > MOST_TOKENS:
            raise _damaged(self.path, f"an id of {self.size - 1}")
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._require_template()

    def tokens(self, text: str) -> list[int]:
        """Ids of a text alone; the names of special tokens are plain text in it."""
        return self._model.encode(in_unicode(text), add_special_tokens=False).ids

    def prompt(self, caption: str, most: int | None = None) -> list[int]:
        """Ids of a caption in the template, from the start token to <begin_of_image>.

        With `most`, the end of a longer caption is left out, so that there are no more tokens.
        """
        before = [self.start_id, self.user_id]
        after = [self.assistant_id, *self.tokens(":"), self.begin_of_image_id]
        words = self.tokens(f": {caption.strip()}\n\n")
        if most is not None and len(before) + len(words) + len(after) > most:
            end = self.tokens("\n\n")
            words = [*words[: max(0, most - len(before) - len(end) - len(after))], *end]
        return [*before, *words, *after]

    def question(self, text: str, num_patches: int) -> list[int]:
        """Ids of a question about an image, after the system prompt: as the authors' processor has them.

        `<|User|>: <image>\\nTEXT\\n\\n<|Assistant|>:`, where the image is begin_of_image, so many placeholders and
        end_of_image.
        """
        image = [self.begin_of_image_id, *[self.image_placeholder_id] * num_patches, self.end_of_image_id]
        asked = [self.user_id, *self.tokens(": "), *image, *self.tokens(f"\n{text.strip()}\n\n")]
        return [self.start_id, *self.tokens(ANSWERING), *asked, self.assistant_id, *self.tokens(":")]

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids up to the end token, without special tokens and without white space around it.

        A character of which the last ids hold the beginning alone is left out.
        """
        said = list(ids)
        said = said[: said.index(self.end_id)] if self.end_id in said else said
        return self._model.decode(said, skip_special_tokens=True).rstrip("\ufffd").strip()

    def encode(
        self, prompts: Sequence[str], length: int, *, cut: bool = False
    ) -> tuple[Int[np.ndarray, "B length"], Bool[np.ndarray, "B length"]]:
        """Ids of captions in the template, padded on the left.

        Args:
          prompts: B captions.
          length: tokens of a row.
          cut: whether the ends of captions are left out that are too long.

        Returns:
          ids int32, `pad_id` on padding, and the mask that is True on tokens.

        Raises RearError: a prompt has more tokens than `length`, and is not to be cut; or the template has.
        """
        ids = np.full((len(prompts), length), self.pad_id, np.int32)
        mask = np.zeros((len(prompts), length), bool)
        for row, visible, caption in zip(ids, mask, prompts, strict=True):
            tokens = self.prompt(caption, length if cut else None)
            if len(tokens) > length:
                shown = in_unicode(caption.strip())
                shown = f"{shown[:SHOWN]}…" if len(shown) > SHOWN else shown
                raise RearError(
                    f"The prompt {shown!r} has {len(tokens)} tokens with its template, and there is room for {length}: "
                    "shorten it, or give more room (config.text.length)."
                )
            row[length - len(tokens) :], visible[length - len(tokens) :] = tokens, True
        return ids, mask

    def _require_template(self) -> None:
        """Raises RearError where the file splits the whole template otherwise than `prompt` does piece by piece.

        It does where a special token is not one of its added tokens, or takes blanks beside it.
        """
        user, assistant, begin = (SPECIAL[f"{name}_id"] for name in ("user", "assistant", "begin_of_image"))
        whole = f"{SPECIAL['start_id']}{user}: a dog\n\n{assistant}:{begin}"
        self._model.encode_special_tokens = False
        found = self.tokens(whole)
        self._model.encode_special_tokens = True  # as plain text, from here on
        if found != self.prompt("a dog"):
            raise RearError(f"{self.path} does not keep Janus' special tokens whole: {FROM_JANUS}.")


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise RearError(f"There is no vocabulary {path}: {FROM_JANUS}.")
    if (size := places.size(path)) > MOST_BYTES:
        raise RearError(f"{path} has {size / 2**20:.0f} MiB, more than any vocabulary: {FROM_JANUS}.")
    return path.read_bytes()


def _model(content: bytes, path: Path) -> "tokenizers.Tokenizer":
    """The model of a file, without cutting and padding, in which all of `SPECIAL` are special tokens."""
    described = _described(content, path)
    added = {token["content"]: token for token in described["added_tokens"]}
    for name in SPECIAL.values():
        if name not in added:
            raise RearError(f"{path} has no special token {name}: it is of another network; {FROM_JANUS}.")
        added[name]["special"] = True  # whatever the file says: only then it can be kept out of a text
    with needed("text"):
        import tokenizers
    try:
        model = tokenizers.Tokenizer.from_str(json.dumps(described))
        model.encode("\ue000")  # fails where the model has no token for a byte
    except Exception as error:  # the package raises no other class
        raise _damaged(path, error) from error
    model.no_truncation()
    model.no_padding()
    return model


def _described(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON of a file, whose `added_tokens` is a list of tables with a name each."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    added = found.get("added_tokens") if isinstance(found, dict) else None
    tables = isinstance(added, list) and all(isinstance(token, dict) for token in added)
    if not tables or not all(isinstance(token.get("content"), str) for token in added):
        raise _damaged(path, "it has no list of added tokens")
    return found


def _damaged(path: Path, why: object) -> RearError:
    told = " ".join(str(why).split())[:200]
    return RearError(f"{path} is no whole vocabulary ({told}): fetch Janus' tokenizer.json again.")
