"""Speed of code files: importing RAR's lines into them, and feeding batches from them.

    python benchmarks/data.py

Importing runs on one core. Both figures count wall time; that of the processor stands beside it, because a busy machine
stretches only the former. What is read was written just before and lies in the operating system's cache.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import measure
import numpy as np

from rear_jax.data.batches import code_batches
from rear_jax.data.codes import open_codes, write_codes
from rear_jax.data.codes_header import CodesHeader
from rear_jax.data.imports import Limits, open_import

CLASSES = 1000


def write_lines(path: pathlib.Path, arguments) -> None:
    """Random codes in RAR's format."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for label in rng.integers(CLASSES, size=arguments.lines).tolist():
            tokens = rng.integers(arguments.codebook, size=arguments.codes).tolist()
            file.write(json.dumps({"class_id": label, "tokens": tokens}) + "\n")


def header(arguments, images: int) -> CodesHeader:
    """Of so many random images with one view."""
    return CodesHeader(
        num_images=images,
        num_augmentations=1,
        augmentation="imported",
        codes_per_image=arguments.codes,
        codebook_size=arguments.codebook,
        image_size=256,
        num_classes=CLASSES,
        fingerprint="none",
        source="random",
        split="random",
        num_shards=min(arguments.shards, images),
    )


def import_lines(lines: pathlib.Path, folder: pathlib.Path, arguments) -> None:
    """What `--job=import` does between loading the tokenizer and counting the classes."""
    source = open_import(lines, Limits(arguments.codes, arguments.codebook, CLASSES))
    write_codes(folder, header(arguments, source.num_images), source.read, progress=lambda *_: None)


def write_random(folder: pathlib.Path, arguments) -> None:
    """Code files to read."""
    rng = np.random.default_rng(0)

    def encode(start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = rng.integers(arguments.codebook, size=(stop - start, arguments.codes))
        return codes, rng.integers(CLASSES, size=stop - start), np.zeros(stop - start, int)

    write_codes(folder, header(arguments, arguments.records), encode, progress=lambda *_: None)


def feed(folder: pathlib.Path, arguments, *, in_memory: bool) -> Callable[[int], None]:
    """A function that takes one epoch of batches, another each time."""
    codes = open_codes(folder, in_memory=in_memory)
    steps = arguments.records // arguments.batch

    def epoch(repeat: int) -> None:
        batches = code_batches(codes, batch_size=arguments.batch, seed=0, start_step=repeat * steps)
        for _ in range(steps):
            next(batches)
        batches.close()

    return epoch


def timed(function: Callable[[int], None], repeats: int) -> list[tuple[float, float]]:
    """Seconds of wall and of processor time of each call."""
    found = []
    for repeat in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        function(repeat)
        found.append((time.perf_counter() - wall, time.process_time() - processor))
    return found


def row(what: str, count: int, seconds: list[tuple[float, float]]) -> tuple[str, ...]:
    """Rates of the median, with the slowest and the fastest repeat."""
    wall, processor = (sorted(count / s for s in column) for column in zip(*seconds, strict=True))
    return what, f"{np.median(wall):,.0f} ({wall[0]:,.0f} to {wall[-1]:,.0f})", f"{np.median(processor):,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {
        "lines": 100_000,
        "records": 200_000,
        "codes": 256,
        "codebook": 1024,
        "batch": 2048,
        "shards": 256,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_lines(folder / "codes.jsonl", arguments)
        write_random(folder / "codes", arguments)
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        disk = timed(feed(folder / "codes", arguments, in_memory=False), arguments.repeats)
        memory = timed(feed(folder / "codes", arguments, in_memory=True), arguments.repeats)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        imported = timed(
            lambda repeat: import_lines(folder / "codes.jsonl", folder / f"imported{repeat}", arguments),
            arguments.repeats,
        )
    batches = arguments.records // arguments.batch * arguments.batch
    measure.table(
        [
            ("what", "a second, median (min to max)", "a second of processor time"),
            row(f"importing lines of {arguments.codes} codes, one core", arguments.lines, imported),
            row(f"sequences in batches of {arguments.batch}, from disk", batches, disk),
            row(f"sequences in batches of {arguments.batch}, codes.in_memory", batches, memory),
        ]
    )


if __name__ == "__main__":
    main()
