"""One picture of a sampled set: a row for each prompt, or blocks of images with the class under them."""

from collections.abc import Sequence

import numpy as np

from rear_jax.data.prompts import Prompt
from rear_jax.runtime import pictures

ROWS, COLUMNS = 10, 12  # of images at most


def prompt_sheet(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """A picture with one row per prompt, the first few of them, and samples of each; the images go prompt by prompt."""
    shown, each = prompts[:ROWS], len(images) // len(prompts)
    rows = images[: len(shown) * each].reshape(len(shown), each, *images.shape[1:])
    return pictures.prompt_sheet(rows[:, :COLUMNS], [prompt.text for prompt in shown])


def class_sheet(images: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """A picture of the first few classes, or captions: some samples of each side by side, and under them which it is.

    Each has as many samples as the one with the fewest; where these are few, several classes share a row.

    Args:
      images: uint8 [n, H, W, 3].
      labels: [n].
      names: of the classes by number, as far as they are known.
    """
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    classes = classes[np.argsort(first)]  # in the order in which they were asked for
    each = min(COLUMNS, counts.min())
    across = min(COLUMNS // each, len(classes))
    shown = classes[: ROWS * across]
    blocks = np.stack([images[np.flatnonzero(labels == label)[:each]] for label in shown])
    down = -(-len(shown) // across)
    texts = [f"{label} {names[label]}" if label < len(names) else str(label) for label in shown.tolist()]
    return pictures.captioned_sheet(blocks, texts, -(-len(shown) // down))
