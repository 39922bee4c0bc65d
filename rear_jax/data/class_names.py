"""Classes by name: what the classes of an experiment are called, and which numbers its names stand for."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rear_jax.data import fashion_mnist
from rear_jax.data.sources import CLASS_NAMES, tfds_sets
from rear_jax.errors import RearError

IMAGENET = Path(__file__).parent / "embedded" / "imagenet_classes.txt"  # one name a line; '#' begins a comment
IMAGENET_SET = "imagenet2012"  # in TFDS
IMAGENET_ID = re.compile(r"n\d{8}")  # what WordNet calls one of its classes
NEAREST = 3  # names that a message proposes
OPTION = "config.sample.classes"


def imagenet_names() -> tuple[str, ...]:
    """A short name for each of the 1000 classes of ImageNet-1k, by the usual numbers."""
    return tuple(line for line in IMAGENET.read_text().splitlines() if not line.startswith("#"))


def class_names(data: ConfigDict) -> tuple[str, ...]:
    """Names of the classes by number, as far as files tell; () where they have none or are not there.

    ImageNet's names need no files. Of a set whose classes are called by WordNet's ids, all 1000 of them, they are
    ImageNet's.

    Args:
      data: `config.data`.
    """
    names = _names(data)[: data.num_classes]
    if len(names) == len(imagenet_names()) and all(map(IMAGENET_ID.fullmatch, names)) and list(names) == sorted(names):
        return imagenet_names()
    return names


def _names(data: ConfigDict) -> tuple[str, ...]:
    parts = [part.partition(":")[0] for part in Path(data.path).parts]
    if data.source == "tfds" and IMAGENET_SET in parts:
        return imagenet_names()
    if data.source == "fashion_mnist":
        return fashion_mnist.CLASS_NAMES
    try:
        if data.source == "tfds":
            return tfds_sets.class_names(data.path)
        return CLASS_NAMES[data.source](data.path, data.train_split) if data.source in CLASS_NAMES else ()
    except RearError:  # published weights are used without the images
        return ()


def class_numbers(wanted: Sequence[int | str], data: ConfigDict, option: str = OPTION) -> np.ndarray:
    """Numbers of classes that are given by number or by name, int32.

    Capital letters do not count in names, and '_' and '-' are as good as a blank. A text may hold several, with commas
    between them: 'golden_retriever,360'.

    Args:
      wanted: numbers and names.
      data: `config.data`.
      option: where they were given, for messages.

    Raises RearError: there is no such class.
    """
    names = class_names(data) if any(isinstance(one, str) for one in wanted) else ()
    numbers = {_plain(name): number for number, name in enumerate(names)}
    found = []
    for one in wanted:
        several = one.split(",") if isinstance(one, str) and _plain(one) not in numbers else [one]
        found += [_number(part, numbers, names, option) for part in several]
    if wrong := [number for number in found if not 0 <= number < data.num_classes]:
        raise RearError(f"{option}: there is no class {wrong[0]}: give 0 to {data.num_classes - 1}.")
    return np.array(found, np.int32)


def _plain(name: str) -> str:
    return " ".join(re.sub(r"[_-]", " ", name).casefold().split())


def _number(one: int | str, numbers: dict[str, int], names: Sequence[str], option: str) -> int:
    if not isinstance(one, str):
        return int(one)
    plain = _plain(one)
    if plain in numbers:
        return numbers[plain]
    if re.fullmatch(r"[0-9]{1,9}", plain):
        return int(plain)
    if not names:
        raise RearError(f"{option}: {one.strip()!r} is no number, and nothing tells the names of the classes: give it.")
    raise RearError(f"{option}: no class is called {one.strip()!r}. The nearest: {_nearest(plain, numbers, names)}.")


def _nearest(plain: str, numbers: dict[str, int], names: Sequence[str]) -> str:
    """A few names that are written alike or share a word with `plain`, each with its number."""
    close = difflib.get_close_matches(plain, numbers, NEAREST, 0.6)
    sharing = [name for name in numbers if set(name.split()) & set(plain.split())]
    near = list(dict.fromkeys([*close, *sharing, *difflib.get_close_matches(plain, numbers, NEAREST, 0)]))[:NEAREST]
    return ", ".join(f"{names[numbers[name]]!r} ({numbers[name]})" for name in near)
