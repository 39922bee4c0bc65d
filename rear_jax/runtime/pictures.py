"""Grids of images, images beside their prompts, and PNG files."""

import re
import shutil
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rear_jax.runtime.atomic import atomic_file

TEXT_WIDTH, LINE_HEIGHT, FONT_SIZE, MARGIN = 240, 15, 12, 4  # pixels, of the prompts in a sheet
SMALLEST_IN_SHEET = 64  # pixels, of an image beside its prompt: four lines of text
SLUG_CHARACTERS = 60  # of a prompt, at most, in the name of a file


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


def prompt_sheet(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """A picture with a row for each prompt: its text, wrapped, and its images on the right.

    A prompt that is too long for its row ends in "…". Letters lose their accents, and what Pillow's own font lacks
    becomes a box.

    Args:
      images: uint8 [n, m, H, W, 3], m images of each prompt; those below 64 pixels are enlarged.
      prompts: n texts.
    """
    factor = -(-SMALLEST_IN_SHEET // images.shape[3])
    large = images.repeat(factor, axis=2).repeat(factor, axis=3)
    rows = []
    for some, prompt in zip(large, prompts, strict=True):
        text = _text_block(prompt, TEXT_WIDTH, large.shape[2])
        rows.append(np.concatenate([text, grid(some, len(some))], axis=1))
    return grid(np.stack(rows), 1, gap=2)


def captioned_sheet(blocks: np.ndarray, captions: Sequence[str], columns: int) -> np.ndarray:
    """A picture with blocks of images side by side, each with a line of text under it.

    Args:
      blocks: uint8 [n, m, H, W, 3], m images a block; those below 64 pixels are enlarged.
      captions: n texts; what is too long ends in "…".
      columns: blocks in a row.
    """
    factor = -(-SMALLEST_IN_SHEET // blocks.shape[3])
    large = blocks.repeat(factor, axis=2).repeat(factor, axis=3)
    drawn = []
    for some, caption in zip(large, captions, strict=True):
        images = grid(some, len(some))
        drawn.append(np.concatenate([images, _text_block(caption, images.shape[1], LINE_HEIGHT + 2)]))
    return grid(np.stack(drawn), columns, gap=2)


def _text_block(text: str, width: int, height: int) -> np.ndarray:
    """Small black text on white, wrapped and cut to [height, width, 3]."""
    block = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(size=FONT_SIZE)
    lines = wrapped(text, font, width - 2 * MARGIN, max(1, (height - 2) // LINE_HEIGHT))
    for number, line in enumerate(lines):
        draw.text((MARGIN, number * LINE_HEIGHT), line, fill="black", font=font)
    return np.asarray(block)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken at blanks where that is possible; a cut text ends in "…"."""
    lines, line = [], ""
    bare = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    for word in bare.encode(errors="replace").decode().split():
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        *whole, line = _pieces(word, font, width)
        lines += whole
        if len(lines) > most_lines:
            break
    lines.append(line)
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: most_lines - 1], f"{last}…"]


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word that is too long for a line in parts that are not."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces


def prompt_file_name(prompt_number: int, prompt: str, image_number: int) -> str:
    """A name such as `0003_a-photo-of-a-red-dog_01.png`, both numbers from 0.

    It has ASCII letters in lower case, digits, "-" and "_" alone, and at most 60 characters of the prompt. The numbers
    make it unique.
    """
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:SLUG_CHARACTERS].strip("-")
    return f"{prompt_number:04d}_{slug or 'prompt'}_{image_number:02d}.png"


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 image [H, W, 3] under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def save_folder(folder: Path, images: Iterable[np.ndarray], names: Sequence[str] = ()) -> None:
    """Writes uint8 images [H, W, 3] under `names`, without them as 000000.png, 000001.png, ...

    The folder appears when all are there.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(temporary / (names[index] if names else f"{index:06d}.png"))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
