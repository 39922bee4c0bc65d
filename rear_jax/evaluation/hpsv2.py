"""The benchmark of HPSv2: the folder that its official scorer reads.

Wu et al. 2023, "Human Preference Score v2: A Solid Benchmark for Evaluating Human Preferences of Text-to-Image
Synthesis", arXiv:2306.09341. Its prompts are in four files, `anime.json`, `concept-art.json`, `paintings.json` and
`photo.json`, 800 in each. The scorer is the package `hpsv2` (github.com/tgxs002/HPSv2):

    python -c 'import hpsv2; hpsv2.evaluate("DIR/hpsv2", hps_version="v2.1")'
"""

import io
import itertools
import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rear_jax.data.prompts import HPS_STYLES, Prompt
from rear_jax.errors import RearError
from rear_jax.runtime.atomic import atomic_file

log = logging.getLogger(__name__)

PROMPTS_PER_STYLE = 800


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Logs a warning where these are other prompts than the benchmark's 800 of each of its four styles.

    Raises RearError: a prompt is of none of the styles.
    """
    for number, prompt in enumerate(prompts, 1):
        if prompt.category not in HPS_STYLES:
            raise RearError(
                f"prompt {number} ({prompt.text[:40]!r}) is of no style of HPSv2: give the folder of its prompts, with "
                f"{', '.join(f'{style}.json' for style in HPS_STYLES)}."
            )
    counts = Counter(prompt.category for prompt in prompts)
    if any(counts[style] != PROMPTS_PER_STYLE for style in HPS_STYLES):
        told = ", ".join(f"{style} {counts[style]}" for style in HPS_STYLES)
        log.warning("hpsv2: %d prompts (%s), the benchmark has %d of each", len(prompts), told, PROMPTS_PER_STYLE)


def write_folder(folder: Path, prompts: Sequence[Prompt], images: Iterable[np.ndarray]) -> int:
    """Writes `<style>/00000.jpg` and so on, an image for each prompt, counted in its style.

    Files are JPEG of Pillow's own quality, as the benchmark's text has it. A file that is the same already is kept; any
    other is replaced. Styles and images of an earlier set are removed: the scorer takes every folder that it finds.

    Args:
      folder: of the whole set.
      prompts: of HPSv2, in order.
      images: uint8 [H, W, 3], one for each prompt, read one by one.

    Returns:
      how many files were written; the others were there.

    Raises RearError: as `check_prompts`, or there are fewer or more images than prompts.
    """
    check_prompts(prompts)
    counts, written = Counter(), 0
    for image, prompt in itertools.zip_longest(images, prompts):
        if image is None or prompt is None:
            raise RearError(f"{folder}: there is not one image for each of {len(prompts)} prompts: draw them again.")
        place = folder / prompt.category / f"{counts[prompt.category]:05d}.jpg"
        counts[prompt.category] += 1
        written += _write_jpeg(place, image)
    _remove_others(folder, counts)
    return written


def _write_jpeg(place: Path, image: np.ndarray) -> bool:
    """Whether the file had to be written."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="JPEG")
    if place.is_file() and place.read_bytes() == encoded.getvalue():
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place) as temporary:
        temporary.write_bytes(encoded.getvalue())
    return True


def _remove_others(folder: Path, counts: Counter[str]) -> None:
    """Removes what an earlier set has left: styles that are not in `counts`, and images beyond."""
    for style in HPS_STYLES:
        if not counts[style]:
            shutil.rmtree(folder / style, ignore_errors=True)
            continue
        for file in (folder / style).iterdir():
            number = re.fullmatch(r"([0-9]{5,})\.jpg(\.tmp0)?", file.name)
            if number and (number[2] or int(number[1]) >= counts[style]):
                file.unlink()
