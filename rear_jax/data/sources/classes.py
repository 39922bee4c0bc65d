"""Numbers of classes: their names decide, in the order of the training split, in whatever split they are.

A class that a split lacks keeps its number, and the classes after it keep theirs.
"""

from collections.abc import Sequence

import numpy as np

from rear_jax.errors import RearError, one_line

NAMED = 5  # classes that a message names


def numbered(labels: Sequence[int | str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of classes, sorted, and the number of each label among them, int64 [n].

    Where all labels are numbers, they stay as they are, and there are no names.
    """
    if all(isinstance(label, int) for label in labels):
        return (), np.array(labels, np.int64)
    names = [str(label) for label in labels]
    known = tuple(sorted(set(names)))
    numbers = {name: number for number, name in enumerate(known)}
    return known, np.fromiter((numbers[name] for name in names), np.int64, len(names))


def by_training(
    names: Sequence[str], labels: np.ndarray, training: tuple[str, ...], where: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels [n] by the numbers and names of the training split; those of the split where one of them has no names.

    Args:
      names: of the split's own classes, () where it has none.
      labels: int64 [n], the split's own numbers.
      training: names of the training split, by number; none where the split numbers its own.
      where: names the split.

    Raises RearError: the training split lacks a class.
    """
    own = tuple(names)
    if not training or training == own or not own or labels.max(initial=0) >= len(own):
        return labels, own
    present = np.unique(labels)
    numbers = np.zeros(len(own), np.int64)
    numbers[present] = renumbered([own[label] for label in present.tolist()], training, where)
    return numbers[labels], training


def numbers_as_names(
    names: Sequence[str], labels: np.ndarray, training: tuple[str, ...]
) -> tuple[Sequence[str], np.ndarray]:
    """Names and labels [n] of a split whose labels happen to be numbers, where those of the training split are names.

    Other splits stay as they are. The class `3` beside `cat` is a name, whatever number it has.
    """
    if names or not training:
        return names, labels
    return numbered([str(label) for label in labels.tolist()])


def renumbered(own: Sequence[str], training: Sequence[str], where: str) -> np.ndarray:
    """The number in the training split of each class of a split, int64.

    Args:
      own: the names of the split's classes.
      training: those of the training split, by number; none where the split numbers its own.
      where: names the split.

    Raises RearError: the training split lacks a class.
    """
    numbers = {name: number for number, name in enumerate(training or own)}
    if unknown := [one_line(name) for name in own if name not in numbers]:
        more = ", ..." if len(unknown) > NAMED else ""
        raise RearError(
            f"{where} has classes that the training split lacks: {', '.join(unknown[:NAMED])}{more}; remove them "
            "there, or add them to the training split"
        )
    return np.array([numbers[name] for name in own], np.int64)
