"""GenEval: the folder that its official scorer reads, and a table of what the scorer says.

Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv:2310.11513. The
scorer (`evaluation/evaluate_images.py` of github.com/djghosh13/geneval) looks for the objects of a prompt with a
detector that is not part of this project. It needs CUDA, mmdetection 2 and the weights of Mask2Former:

    python evaluation/evaluate_images.py DIR/geneval --outfile results.jsonl --model-path DETECTOR_FOLDER

This prints the scores beside published ones:

    python -m rear_jax.evaluation.geneval results.jsonl
"""

import itertools
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from rear_jax.data.prompts import Prompt, json_object, listed, numbered_lines
from rear_jax.errors import RearError
from rear_jax.runtime import pictures
from rear_jax.runtime.figures import table

log = logging.getLogger(__name__)

TASKS = {  # in the order of the benchmark -> number of its prompts
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
RELATIONS = ("left of", "right of", "above", "below")
IMAGES_PER_PROMPT = 4  # of the benchmark
GRID_COLUMNS = 2
RESULT_FIELDS = ("filename", "tag", "correct")  # of the scorer's lines, those that count here
PUBLISHED: tuple[tuple[str, str, dict[str, str]], ...] = (  # model, overall, tasks; † second-hand
    ("LlamaGen-XL [1]", "0.306", {"two_object": "0.263†", "counting": "0.197†", "colors": "0.550†"}),
    ("LlamaGen-XL + AR-GRPO [1]", "0.324", {"two_object": "0.263†", "counting": "0.228†", "colors": "0.593†"}),
    ("LlamaGen-XL + VA-π [1]", "0.339", {"two_object": "0.328†", "counting": "0.238†", "colors": "0.606†"}),
    ("Janus-Pro-1B [1]", "0.725", {"two_object": "0.801†", "color_attr": "0.540†"}),
    ("Janus-Pro-1B + VA-π [1]", "0.744", {"two_object": "0.835†", "color_attr": "0.585†"}),
    ("LlamaGen", "0.32†", dict(zip(TASKS, ("0.71†", "0.34†", "0.21†", "0.58†", "0.07†", "0.04†"), strict=True))),
    ("Janus-Pro-1B", "0.73†", dict(zip(TASKS, ("0.98†", "0.82†", "0.51†", "0.89†", "0.65†", "0.56†"), strict=True))),
)


def check_prompts(prompts: Sequence[Prompt], images_per_prompt: int) -> None:
    """Logs a warning where this is another set than the benchmark's 553 prompts with 4 images each.

    Raises RearError: a prompt has no metadata, or metadata that the scorer cannot use.
    """
    tags = Counter(_check_metadata(prompt, number) for number, prompt in enumerate(prompts, 1))
    if dict(tags) != TASKS:
        counts = ", ".join(f"{task} {tags[task]}" for task in TASKS)
        log.warning("geneval: %d prompts (%s), the benchmark has %d", len(prompts), counts, sum(TASKS.values()))
    if images_per_prompt != IMAGES_PER_PROMPT:
        log.warning("geneval: %d images a prompt, the benchmark takes %d", images_per_prompt, IMAGES_PER_PROMPT)


def write_folder(folder: Path, prompts: Sequence[Prompt], images: Iterable[np.ndarray], images_per_prompt: int) -> int:
    """Writes `00000/metadata.jsonl`, `00000/samples/0000.png` and so on, `00000/grid.png`, a folder for each prompt.

    A prompt's folder appears when all of it is there. One that holds these very images and metadata already is kept;
    any other is replaced, and those of prompts that there are no longer are removed: the scorer takes all it finds.

    Args:
      folder: of the whole set.
      prompts: of GenEval, in order.
      images: uint8 [H, W, 3] each, those of the first prompt first, read one prompt at a time.
      images_per_prompt: k.

    Returns:
      how many prompts were written; the others were there.

    Raises RearError: as `check_prompts`, or there are fewer or more than k images for each prompt.
    """
    check_prompts(prompts, images_per_prompt)
    stream, written = iter(images), 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        some = list(itertools.islice(stream, images_per_prompt))
        if len(some) < images_per_prompt:
            drawn = number * images_per_prompt + len(some)
            raise RearError(
                f"{folder}: there are {drawn} images for {len(prompts)} prompts with {images_per_prompt} each: draw "
                "the others."
            )
        place = folder / f"{number:05d}"
        if not _holds(place, prompt, some):
            _write_prompt(place, prompt, some)
            written += 1
    if next(stream, None) is not None:
        raise RearError(
            f"{folder}: there are more images than {len(prompts)} prompts with {images_per_prompt} each: give the "
            "prompts that they were drawn for."
        )
    _remove_others(folder, len(prompts))
    return written


def _check_metadata(prompt: Prompt, number: int) -> str:
    """The tag of a prompt; raises RearError where the scorer cannot use its metadata."""
    where = f"GenEval's metadata, line {number}"
    if not prompt.metadata:
        raise RearError(f"{where} is no line of GenEval ({prompt.text[:40]!r}): give its evaluation_metadata.jsonl.")
    found = json_object(prompt.metadata, where)
    tag = _tag_of(found, where)
    for key in ("include", "exclude"):
        clauses = found.get(key, [])
        if not isinstance(clauses, list) or (key == "include" and not clauses):
            raise RearError(f"{where}: {key} is no list of clauses: mend it.")
        for place, clause in enumerate(clauses):
            if fault := _fault_of(clause, place):
                raise RearError(f"{where}: {key}[{place}] {fault}: mend it.")
    return tag


def _tag_of(found: dict[str, Any], where: str) -> str:
    """The task that a line is of; raises RearError where it is none of the six."""
    tag = found.get("tag")
    if tag not in list(TASKS):
        raise RearError(f"{where} has the tag {str(tag)[:40]!r}, not one of {', '.join(TASKS)}: mend it.")
    return tag


def _fault_of(clause: Any, place: int) -> str:
    """What the scorer cannot use in a clause, '' if there is nothing; a position points to an earlier clause."""
    if not isinstance(clause, dict) or not isinstance(clause.get("class"), str):
        return "names no class"
    if type(clause.get("count")) is not int or clause["count"] < 1:
        return "has no count of 1 or more"
    if not isinstance(clause.get("color", ""), str):
        return "has a color that is no text"
    match clause.get("position"):
        case None:
            return ""
        case [str(relation), int(target)] if relation in RELATIONS and 0 <= target < place:
            return ""
    return f"has a position that is not one of {', '.join(RELATIONS)} with the number of an earlier clause"


def _names(count: int) -> list[str]:
    return [f"{index:04d}.png" for index in range(count)]


def _holds(place: Path, prompt: Prompt, images: Sequence[np.ndarray]) -> bool:
    """Whether a prompt's folder has this metadata, these images to the pixel and no others, and a grid."""
    try:
        if (place / "metadata.jsonl").read_text(encoding="utf-8") != f"{prompt.metadata}\n":
            return False
        if sorted(file.name for file in (place / "samples").iterdir()) != _names(len(images)):
            return False
        files = [*(place / "samples" / name for name in _names(len(images))), place / "grid.png"]
        wanted = [*images, pictures.grid(np.stack(images), GRID_COLUMNS)]
        return all(np.array_equal(_read_png(file), image) for file, image in zip(files, wanted, strict=True))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return False


def _read_png(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def _write_prompt(place: Path, prompt: Prompt, images: Sequence[np.ndarray]) -> None:
    """Replaces a prompt's folder; what is half written has a name that the scorer passes over."""
    temporary = place.with_name(f"{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pictures.save_folder(temporary / "samples", images, _names(len(images)))
    pictures.save_png(temporary / "grid.png", pictures.grid(np.stack(images), GRID_COLUMNS))
    (temporary / "metadata.jsonl").write_text(f"{prompt.metadata}\n", encoding="utf-8")
    shutil.rmtree(place, ignore_errors=True)
    temporary.rename(place)


def _remove_others(folder: Path, count: int) -> None:
    """Removes the folders of prompts from `count` on, which an earlier set has left, and what is half written."""
    for place in folder.iterdir():
        number = re.fullmatch(r"([0-9]{5,})(\.tmp)?", place.name)
        if number and place.is_dir() and (number[2] or int(number[1]) >= count):
            shutil.rmtree(place)


class Scores(NamedTuple):
    """What the scorer says of a set.

    Attributes:
      tasks: task -> share of its images that are right, for the tasks that there are, in the order of the benchmark.
      images: how many were scored.
      prompts: how many folders they were in.
    """

    tasks: dict[str, float]
    images: int
    prompts: int

    @property
    def overall(self) -> float | None:
        """The mean of the six tasks, each with the same weight; None where some are missing."""
        return float(np.mean(list(self.tasks.values()))) if len(self.tasks) == len(TASKS) else None


def read_results(path: str | Path) -> Scores:
    """The scores in the scorer's `results.jsonl`, a JSON object for each image.

    Raises RearError: the file is missing or empty; a line is no such object, lacks a field, has a value that the scorer
      does not write, or scores an image again.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RearError(f"There is no file {path}: run evaluation/evaluate_images.py of GenEval, it writes one.")
    marks: dict[str, list[bool]] = {task: [] for task in TASKS}
    seen: set[str] = set()
    for where, line in numbered_lines(path):
        found = json_object(line, where)
        if lacking := [field for field in RESULT_FIELDS if field not in found]:
            raise RearError(f"{where} lacks {', '.join(lacking)}: it has {listed(found)}. Give the scorer's own file.")
        tag = _tag_of(found, where)
        if not isinstance(found["correct"], bool):
            raise RearError(f"{where}: correct is {str(found['correct'])[:40]!r}, not true or false.")
        if not isinstance(found["filename"], str) or found["filename"] in seen:
            raise RearError(f"{where} scores {str(found['filename'])[:200]!r} again: run the scorer anew.")
        seen.add(found["filename"])
        marks[tag].append(found["correct"])
    if not seen:
        raise RearError(f"{path} holds no results: run the scorer again.")
    tasks = {task: float(np.mean(values)) for task, values in marks.items() if values}
    return Scores(tasks, len(seen), len({Path(name).parent.parent for name in seen}))


def markdown(scores: Scores, name: str) -> str:
    """A table of a set's scores beside published ones, and what to know of it."""
    own = {task: f"{value:.3f}" for task, value in scores.tasks.items()}
    overall = "" if scores.overall is None else f"{scores.overall:.3f}"
    rows = [
        [model, total, *(tasks.get(task, "") for task in TASKS)]
        for model, total, tasks in ((name, overall, own), *PUBLISHED)
    ]
    header = ["model", "overall", *(task.replace("_", " ") for task in TASKS)]
    lines = [table(header, rows), "", f"{name}: {scores.images} images of {scores.prompts} prompts."]
    if missing := [task for task in TASKS if task not in scores.tasks]:
        lines.append(f"There is no overall score: it is the mean of six tasks, and {', '.join(missing)} lack images.")
    if (scores.images, scores.prompts) != (sum(TASKS.values()) * IMAGES_PER_PROMPT, sum(TASKS.values())):
        lines.append(f"The published scores are of {sum(TASKS.values())} prompts with {IMAGES_PER_PROMPT} images each.")
    lines.append("[1]: arXiv:2512.19680. †: second-hand, not checked here.")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Prints the table of one file; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m rear_jax.evaluation.geneval results.jsonl", file=sys.stderr)
        return 2
    try:
        print(markdown(read_results(arguments[0]), Path(arguments[0]).stem))
    except RearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
