"""Prompts in the files that benchmarks come in: what a text-conditional generator draws, a line each.

  .txt    a prompt on each line
  .jsonl  a JSON object on each line, with the prompt under `prompt`, `text` or `caption`, and perhaps a `category`;
          GenEval's `evaluation_metadata.jsonl` (`tag`, `prompt`, `include`, `exclude`) is one, and its lines are kept
  .tsv    columns apart by tabs, under a header with `Prompt` and perhaps `Category`, as PartiPrompts; read as pandas
          reads it: a field that begins with a quotation mark ends with one, and inside it stands twice
  .json   one list of prompts, as each style of HPSv2's benchmark; the category is the name of the file
  folder  the .json files of those styles

Files are UTF-8, with or without a byte order mark. Line ends are \\n or \\r\\n. Blank lines may end a file.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime.atomic import atomic_file

TEXT_KEYS = ("prompt", "text", "caption")  # of a .jsonl line; the first that is there counts
GENEVAL_KEYS = ("tag", "prompt", "include")  # that all lines of GenEval's metadata have
MOST_WORDS = 1000  # of a prompt; text encoders read at most a few hundred tokens
MOST_CHARACTERS = 10_000
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
      text: without blanks at its ends; it may have line breaks inside, if it comes from JSON.
      category: of PartiPrompts, the tag of GenEval, the style of HPSv2, or ''.
      metadata: the line of GenEval's metadata, one JSON object, or ''.
    """

    text: str
    category: str = ""
    metadata: str = ""


def given_prompts(settings: ConfigDict) -> list[Prompt]:
    """The prompts of `config.sample`: those of a file, or one that is given directly; none if neither is set.

    Raises RearError: both are set, the file is refused as by `read_prompts`, or the prompt is too long.
    """
    if settings.prompts and settings.prompt:
        raise RearError("config.sample.prompts and config.sample.prompt are both set: set one of them to ''.")
    if settings.prompt:
        return [Prompt(_checked(settings.prompt, "config.sample.prompt"))]
    return read_prompts(settings.prompts) if settings.prompts else []


def read_prompts(path: str | Path) -> list[Prompt]:
    """All prompts of a .txt, .jsonl, .tsv or .json file, or of a folder of HPSv2's styles, in order.

    Raises RearError: the file is missing, empty or of another kind; a line is blank, not UTF-8 or without a prompt; a
      prompt has more than 1000 words or 10 000 characters. The line is named by its number, from 1.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_styles(path)
    if (suffix := path.suffix.lower()) not in READERS:
        raise RearError(f"{path} is no file of prompts: give a {', '.join(READERS)} file.")
    if not path.is_file():
        raise RearError(f"There is no file of prompts {path}: check the path.")
    prompts = READERS[suffix](path)
    if not prompts:
        raise RearError(f"{path} holds no prompts: write one on each line.")
    return prompts


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Writes a .jsonl that `read_prompts` reads as these very prompts, under a temporary name, and renames it."""
    lines = [one.metadata or json.dumps({"prompt": one.text, "category": one.category}) for one in prompts]
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def numbered_lines(path: Path) -> list[tuple[str, str]]:
    """(where, line) of each line of a UTF-8 file, without line ends and without blank lines at the end of the file.

    Raises RearError: the file cannot be read, or a line is blank, not UTF-8, or has a carriage return inside.
    """
    try:
        lines = path.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n")
    except OSError as error:
        raise RearError(f"{path} cannot be read ({error.strerror}): check the file.") from error
    while lines and not lines[-1].strip():
        lines.pop()
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError as error:
            raise RearError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8.") from error
        if not text.strip():
            raise RearError(f"{where} is blank: remove the line.")
        if "\r" in text:
            raise RearError(f"{where} has a carriage return inside: save the file with \\n or \\r\\n as line ends.")
        found.append((where, text))
    return found


def json_object(line: str, where: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises RearError: it holds none; `where` names the line.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RearError(f"{where} is not JSON ({error}): write one object on each line.") from error
    if not isinstance(found, dict):
        raise RearError(f"{where} is a {type(found).__name__}, not a JSON object: write one on each line.")
    return found


def listed(names: Iterable[str]) -> str:
    """The first ten of the names that a line or a header has, shortened, for messages of one line."""
    return ", ".join(repr(name[:40]) for name in itertools.islice(names, 10)) or "none"


def _read_txt(path: Path) -> list[Prompt]:
    return [Prompt(_checked(line, where)) for where, line in numbered_lines(path)]


def _read_jsonl(path: Path) -> list[Prompt]:
    return [_from_json(line, where) for where, line in numbered_lines(path)]


def _from_json(line: str, where: str) -> Prompt:
    found = json_object(line, where)
    key = next((key for key in TEXT_KEYS if key in found), None)
    if key is None:
        raise RearError(f"{where} has no key {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}: it has {listed(found)}.")
    text = _checked(found[key], f"{where}, key {key!r}")
    if all(key in found for key in GENEVAL_KEYS):
        return Prompt(text, str(found["tag"]), line.strip())
    return Prompt(text, str(found.get("category") or ""))


def _read_tsv(path: Path) -> list[Prompt]:
    rows = _rows(numbered_lines(path))
    where, header = next(rows, ("", []))
    if where and "Prompt" not in header:
        raise RearError(f"{where} names no column Prompt: it has {listed(header)}. Add a header.")
    prompts = []
    for where, row in rows:
        if len(row) <= header.index("Prompt"):
            raise RearError(f"{where} has {len(row)} columns and no Prompt: the header has {len(header)}.")
        named = dict(zip(header, row, strict=False))
        prompts.append(Prompt(_checked(named["Prompt"], where), named.get("Category", "").strip()))
    return prompts


def _rows(lines: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    for where, line in lines:
        try:
            (row,) = csv.reader([line], delimiter="\t")
        except (csv.Error, ValueError) as error:
            raise RearError(f"{where} is no row of columns apart by tabs ({error}): mend it.") from error
        yield where, row


def _read_list(path: Path) -> list[Prompt]:
    try:
        found = json.loads(path.read_bytes().removeprefix(BYTE_ORDER_MARK))
    except (OSError, ValueError, RecursionError) as error:
        raise RearError(f"{path} is not JSON ({error}): write one list of prompts.") from error
    if not isinstance(found, list):
        raise RearError(f"{path} is a {type(found).__name__}, not a list of prompts: write one list of prompts.")
    return [Prompt(_checked(text, f"{path}, prompt {number}"), path.stem) for number, text in enumerate(found, 1)]


def _read_styles(folder: Path) -> list[Prompt]:
    files = [file for style in HPS_STYLES if (file := folder / f"{style}.json").exists()]
    if not files:
        raise RearError(f"{folder} holds none of {', '.join(f'{style}.json' for style in HPS_STYLES)}: give a file.")
    return [prompt for file in files for prompt in read_prompts(file)]


def _checked(text: Any, where: str) -> str:
    """The prompt without blanks at its ends; raises RearError where it is none."""
    if not isinstance(text, str):
        raise RearError(f"{where} is a {type(text).__name__}, not text: write the prompt as one string.")
    text = text.strip()
    if not text:
        raise RearError(f"{where} holds a blank prompt: write one there, or remove the line.")
    if (words := len(text.split())) > MOST_WORDS or len(text) > MOST_CHARACTERS:
        raise RearError(
            f"{where} has {words} words, {len(text)} characters: a prompt has at most {MOST_WORDS} words and "
            f"{MOST_CHARACTERS} characters."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RearError(f"{where} holds half a character, {text[error.start]!a}: remove it.") from error
    return text


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".tsv": _read_tsv, ".json": _read_list}
