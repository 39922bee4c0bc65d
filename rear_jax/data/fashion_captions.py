"""Captions of Fashion-MNIST that say what is in the image: the kind of garment, its brightness and its breadth.

The kind is the label. The other two are measured on the pixels and compared with the median of the same kind of garment
in the embedded training images: half of its images are bright, and half of them wide. So a caption can be checked
against any image, drawn ones included.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from rear_jax.data import fashion_mnist
from rear_jax.errors import RearError

NAMES = ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LIGHT, BREADTH = ("dark", "bright"), ("narrow", "wide")
TEMPLATES = (
    "a {light} {breadth} {name}",
    "a {breadth}, {light} {name}",
    "a photo of a {light} and {breadth} {name}",
    "one {name}, {breadth} and {light}",
    "{name}: {light}, {breadth}",
    "this {name} is {breadth} and {light}",
)
FOREGROUND = 32  # a pixel above is of the garment


class Claim(NamedTuple):
    """What a caption says: the class of the garment, and whether it is bright and wide among its kind."""

    garment: int
    bright: bool
    wide: bool


def caption_of(claim: Claim, number: int) -> str:
    """The caption of image `number`: the templates take turns."""
    words = {"name": NAMES[claim.garment], "light": LIGHT[claim.bright], "breadth": BREADTH[claim.wide]}
    return TEMPLATES[number % len(TEMPLATES)].format(**words)


def claim_of(caption: str) -> Claim:
    """What a caption says, also one that a person wrote: it names a garment, and one word of each pair.

    Raises RearError: it does not, or names several.
    """
    text = caption.lower()
    found = []
    for words in (NAMES, LIGHT, BREADTH):
        named = [n for n, word in enumerate(words) if re.search(rf"(?<![\w-]){word}(?![\w-])", text)]
        if len(named) != 1:
            raise RearError(f"{caption!r} does not say which one it means of: {', '.join(words)}.")
        found += named
    return Claim(found[0], bool(found[1]), bool(found[2]))


def measures(images: UInt8[np.ndarray, "n H W"]) -> Float[np.ndarray, "n 2"]:
    """Of each image: the mean brightness of the garment's pixels, 0 to 255, and their number in a row of it."""
    garment = images > FOREGROUND
    count = garment.sum(axis=(1, 2))
    rows = garment.any(axis=2).sum(axis=1)
    light = np.where(garment, images, 0).sum(axis=(1, 2))
    return np.stack([light / np.maximum(count, 1), count / np.maximum(rows, 1)], axis=1)


def claims(images: UInt8[np.ndarray, "n H W"], garments: Int[np.ndarray, " n"]) -> list[Claim]:
    """What is true of images of these kinds of garments, from their pixels."""
    more = measures(images) > medians()[garments]
    return [
        Claim(int(garment), bool(bright), bool(wide)) for garment, (bright, wide) in zip(garments, more, strict=True)
    ]


@functools.cache
def medians() -> np.ndarray:
    """[10, 2], the median of `measures` for each kind of garment."""
    images, labels = fashion_mnist.load_embedded("train")
    of_all = measures(images)
    return np.stack([np.median(of_all[labels == label], axis=0) for label in range(len(NAMES))])
