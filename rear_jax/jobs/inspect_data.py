"""`--job=inspect`: what is in the images of the experiment, before anything is trained on them."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.inspection import SHOWN_OF_LABEL, SHOWN_SIDE, Inspection, inspect
from rear_jax.data.sources import open_source, source_settings
from rear_jax.data.sources.interface import ImageSource, captioned
from rear_jax.errors import RearError, one_line
from rear_jax.runtime import figures
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.pages import save_page
from rear_jax.runtime.pictures import prompt_sheet, save_png

log = logging.getLogger(__name__)

ALL_BUT_ALL = math.nextafter(1, 0)  # share of what may be broken: it is what the job is to find
ROWS = 10  # of a table of classes at either end, of sizes, of broken images


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `inspect.json`, `inspect.md`, `inspect.html` and, for each split, a sheet `inspect_<split>.png`."""
    splits, texts = {}, []
    for split in _splits(config):
        title = split or "images"
        try:
            source = _opened(config, split)
        except RearError as error:
            if split == config.data.train_split:
                raise
            log.warning("inspect: the held-out images cannot be opened: %s", error)
            splits[title], section = {"error": str(error)}, f"The held-out images cannot be opened: {_cell(str(error))}"
        else:
            found = inspect(source, config.inspect.num_images, f"inspect {title}")
            sheet = f"inspect_{split}.png" if split.replace("_", "").isalnum() else f"inspect_{len(texts)}.png"
            _save_sheet(workdir / sheet, source, found)
            splits[title] = numbers(source, found)
            section = _section(config, source, found, sheet)
        texts.append(f"## {_cell(title)}\n\n{section}")
    write_json(workdir / "inspect.json", {"splits": splits, "data": config.data.to_dict()})
    page = "\n\n".join(texts) + "\n"
    save_page(workdir / "inspect.md", "Images", page)
    log.info("inspect: wrote %s\n%s", workdir / "inspect.md", page)


def check(config: ConfigDict, workdir: Path, before: Collection[str]) -> None:
    """See `Job.check`."""
    if "describe" not in before:
        _opened(config, config.data.train_split)


def numbers(source: ImageSource, found: Inspection) -> dict[str, Any]:
    """What inspect.json holds of a split."""
    sides = found.short_sides()
    measured = {} if not len(sides) else dict(zip(("least", "median", "most"), _three(sides), strict=True))
    classes = {} if captioned(source) else {"classes": _classes(source, found)}
    return {
        "source": source.name,
        "contents": source.contents,
        "num_images": len(source),
        "looked_at": found.good.total() + found.num_broken,
        "captioned": captioned(source),
        "num_classes": None if captioned(source) else source.num_classes,
        "bytes": found.size,
        "short_side": measured,
        "formats": found.counts_of("format"),
        "modes": found.counts_of("mode"),
        "sizes": dict(list(found.counts_of("width", "height").items())[:1000]),
        "turned_by_exif": found.counts_of("turned").get("True", 0),
        "of_several_frames": found.counts_of("moving").get("True", 0),
        "num_broken": found.num_broken,
        "broken": found.reasons,
        **classes,
    }


def _splits(config: ConfigDict) -> tuple[str, ...]:
    return tuple(dict.fromkeys((config.data.train_split, config.data.eval_split)))


def _opened(config: ConfigDict, split: str) -> ImageSource:
    """A split, whatever share of it is broken and however many classes it has."""
    settings = source_settings(config.data, split)._replace(max_broken_share=ALL_BUT_ALL)
    return open_source(config.data.source, config.data.path, split, settings)


def _three(sides: np.ndarray) -> tuple[int, int, int]:
    """The least, the median and the largest of ascending values."""
    return int(sides[0]), int(sides[len(sides) // 2]), int(sides[-1])


def _classes(source: ImageSource, found: Inspection) -> list[dict[str, Any]]:
    """Each class that has a name or an image."""
    labels = range(len(source.class_names)) if source.class_names else sorted(found.good.keys() | found.broken.keys())
    return [
        {"label": label, "name": _name(source, label), "images": found.good[label], "broken": found.broken[label]}
        for label in labels
    ]


def _name(source: ImageSource, label: int) -> str:
    """The caption or the name of a class, or its number."""
    if captioned(source):
        return source.caption(label)
    return source.class_names[label] if source.class_names else str(label)


def _save_sheet(path: Path, source: ImageSource, found: Inspection) -> None:
    """A row for each class or caption that is shown; none where no image is good."""
    columns = max(map(len, found.shown.values()), default=0)
    white = np.full((SHOWN_SIDE, SHOWN_SIDE, 3), 255, np.uint8)
    rows = [[*images, *[white] * (columns - len(images))] for _, images in sorted(found.shown.items())]
    if columns:
        save_png(path, prompt_sheet(np.array(rows), [_name(source, label) for label in sorted(found.shown)]))


def _section(config: ConfigDict, source: ImageSource, found: Inspection, sheet: str) -> str:
    """What inspect.md holds of a split."""
    looked_at, sides = found.good.total() + found.num_broken, found.short_sides()
    facts = [f"{len(source)} images, {looked_at} of them looked at; {found.num_broken} are broken."]
    if len(sides):
        small = int(np.searchsorted(sides, config.data.image_size))
        least, median, most = _three(sides)
        facts.append(
            f"Shorter sides: {least} to {most} pixels, half of them at most {median}. {small} images are smaller than "
            f"config.data.image_size = {config.data.image_size} and are enlarged."
        )
        facts.append(f"{found.size / 1e6:.4g} MB on the disk. Every image becomes 8-bit RGB.")
    parts = [" ".join(facts)]
    if found.shown:
        parts.append(f"![Images of some classes, up to {SHOWN_OF_LABEL} each]({sheet})")
    if not captioned(source):
        parts.append(_class_table(config, source, found))
    for title, fields in (("format", ("format",)), ("mode", ("mode",)), ("width x height", ("width", "height"))):
        rows = [(value, str(count)) for value, count in found.counts_of(*fields).items()]
        parts.append(figures.table((title, "images"), _ends(rows, 2 * ROWS, 0)))
    told = {"turned": "are turned by their EXIF orientation", "moving": "have several frames; the first is taken"}
    for field, words in told.items():
        if count := found.counts_of(field).get("True", 0):
            parts.append(f"{count} images {words}.")
    if found.reasons:
        lines = [f"- {_cell(reason)}" for reason in found.reasons[:ROWS]]
        more = [f"- {found.num_broken - ROWS} more, see inspect.json"] if found.num_broken > ROWS else []
        parts.append("\n".join(["Broken images:", "", *lines, *more]))
    return "\n\n".join(part for part in parts if part)


def _class_table(config: ConfigDict, source: ImageSource, found: Inspection) -> str:
    """The classes, the largest first, and what does not fit `config.data.num_classes`."""
    classes = sorted(_classes(source, found), key=lambda one: (-one["images"], one["label"]))
    rows = [tuple(_cell(str(one[key])) for key in ("name", "label", "images", "broken")) for one in classes]
    count, wanted = source.num_classes, config.data.num_classes
    fits = "" if wanted in (0, count) else f" But config.data.num_classes is {wanted}."
    table = figures.table(("class", "number", "images", "broken"), _ends(rows, ROWS, ROWS))
    return f"{count} classes.{fits}\n\n{table}"


def _ends(rows: list[tuple[str, ...]], first: int, last: int) -> list[tuple[str, ...]]:
    """The first and the last rows of a table, and a line for what is between them."""
    left_out = len(rows) - first - last
    if left_out <= 1:
        return rows
    return [*rows[:first], (f"{left_out} more", *[""] * (len(rows[0]) - 1)), *rows[len(rows) - last :]]


def _cell(text: str) -> str:
    """A text that a cell of a table can hold."""
    return one_line(text).replace("|", "\\|")
