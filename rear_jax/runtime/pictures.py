"""Grids of images and PNG files."""

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rear_jax.runtime.atomic import atomic_file


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[..., 3] floats in [0, 1] to 8 bits for pictures: clip, times 255, truncate; scores have `eight_bit`."""
    return (np.clip(np.asarray(images, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)


def grid(images: np.ndarray, columns: int, *, gap: int = 1) -> np.ndarray:
    """Lays uint8 images [n, H, W, 3] out in rows of `columns`, white between and where the last row ends early."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def labelled(images: np.ndarray, texts: Sequence[str], *, smallest: int = 64) -> np.ndarray:
    """uint8 images [n, H, W, 3] with a line of text under each, those below `smallest` pixels enlarged."""
    factor = -(-smallest // images.shape[2])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    strips = np.stack([_strip(text, large.shape[2]) for text in texts])
    return np.concatenate([large, strips], axis=1)


def _strip(text: str, width: int) -> np.ndarray:
    """One line of small black text on white, [12, width, 3]."""
    strip = Image.new("RGB", (width, 12), "white")
    ImageDraw.Draw(strip).text((2, 0), text, fill="black", font=ImageFont.load_default(size=10))
    return np.asarray(strip)


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, 3] under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def save_folder(folder: Path, images: Iterable[np.ndarray]) -> None:
    """Writes uint8 images [H, W, 3] as 000000.png, 000001.png, ...; the folder appears when all are there."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(temporary / f"{index:06d}.png")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
