"""Draws a sheet of the study of Freedoom scenes: held-out scenes, what the tokenizer makes of them, and samples.

    python benchmarks/freedoom_sheet.py STUDY [--guidance=1] [--to=docs/evidence_freedoom.png]

STUDY is the workdir of configs/study_freedoom.py. Run it from the folder of that command, where the images are. A
column is a map. Samples are those of the first seed.
"""

import argparse
from pathlib import Path

import evidence
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import rear_jax
from rear_jax.config import files
from rear_jax.data.sources import open_split
from rear_jax.runtime.figures import save_figure

COLUMNS, ROWS = 14, 2  # maps, and images of each


def grid(images: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """uint8 [ROWS * H, classes * W, 3]: the first images of each of these classes, one class a column."""
    chosen = [images[np.flatnonzero(labels == number)[:ROWS]] for number in classes]
    return np.concatenate([np.concatenate(list(column), axis=0) for column in chosen], axis=1)


def real_images(config: ConfigDict, tokenizer: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out images of the maps that are shown, the same images after the tokenizer, and their labels."""
    source = open_split(config.data, config.data.eval_split)
    labels = np.array([source[place][1] for place in range(len(source))])
    maps = np.arange(COLUMNS) * config.data.num_classes // COLUMNS  # evenly spread
    places = [place for number in np.unique(maps) for place in np.flatnonzero(labels == number)[:ROWS]]
    images = np.stack([source[place][0] for place in places])
    model = rear_jax.load(config, tokenizer=tokenizer)
    return images, model.decode(model.encode(images)), labels[places]


def draw(config: str, study: Path, guidance: str, to: Path) -> None:
    """Four blocks of rows: real, reconstructed, AR, reAR."""
    images, reconstructed, labels = real_images(files.load(config), study / "tokenizer")
    classes = np.unique(labels)
    blocks = {"held out": grid(images, labels, classes), "tokenizer": grid(reconstructed, labels, classes)}
    for variant in ("ar", "rear"):
        with np.load(study / "seed_0" / variant / "sweep" / f"{guidance}_1" / "samples.npz") as samples:
            blocks[evidence.NAMES[variant]] = grid(samples["arr_0"], samples["labels"], classes)
    figure = Figure(figsize=(12.0, 7.2), layout="constrained")
    for panel, (name, block) in zip(figure.subplots(len(blocks), 1), blocks.items(), strict=True):
        evidence.show_image(panel, block, name)
    save_figure(to, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a workdir")
    parser.add_argument("--config", default="study_freedoom", help="name or path of the study's config")
    parser.add_argument("--guidance", default="1", help="the scale of the samples, as the study's folders name it")
    parser.add_argument("--to", type=Path, default=Path("docs/evidence_freedoom.png"), help="a file")
    draw(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
