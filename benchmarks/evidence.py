"""Draws the pictures of docs/evidence.md: what reAR and VA-π give, from the workdirs of four studies.

    python benchmarks/evidence.py STUDY_REAR STUDY_REAR_ALL STUDY_VA_PI_LONG STUDY_VA_PI_AFTER_AR [--to=docs]

The first two are those of configs/study_rear.py, without and with :all, the others those of configs/study_va_pi.py with
:long and :after_ar. The distance is that of samples from held-out images after the tokenizer: it is what the generator
alone loses. Dots are seeds, and so are the edges of bands. Samples are the first two of each class, with the first
seed: of plain AR and reAR at guidance 3 in evidence.png, and of the parts of VA-π without guidance in
evidence_va_pi.png.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rear_jax.runtime.figures import finish_panel, save_figure

GREY, BLUE, PALE = "#8a8a8a", "#2f6db5", "#a9c4e4"
NAMES = {"ar": "AR", "rear": "reAR", "rar": "RAR", "noise": "noise alone", "both_embeddings": "both embeddings"}
NAMES |= {"shallow_embedding": "embedding, current code", "deep_embedding": "embedding, next code"}
COLORS = {"ar": GREY, "rear": BLUE}
PARTS = {"before": "before", "prior_only": "prior only", "both": "VA-π", "reward_only": "reward only"}
BEST = "New samples at the best guidance of each run"
UNGUIDED = "Samples without guidance"


def results(workdir: Path) -> dict[str, list[dict]]:
    """Variant -> for each seed, title of a table -> values."""
    return json.loads((workdir / "study.json").read_text())["results"]


def distances(runs: list[dict], title: str) -> list[float]:
    """Of each seed: the distance of samples from held-out images after the tokenizer."""
    return [next(value for name, value in run[title].items() if name.endswith("from reconstructions")) for run in runs]


def bars(panel: Axes, rows: dict[str, tuple[list[float], str]]) -> None:
    """Name -> (a value for each seed, color): a horizontal bar as long as the mean, and a dot for each seed."""
    for place, (values, color) in enumerate(rows.values()):
        panel.barh(place, statistics.fmean(values), color=color, height=0.7)
        panel.plot(values, [place] * len(values), "o", color="black", markersize=3)
        panel.text(max(values), place, f"  {statistics.fmean(values):.0f}", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
    panel.set_xlim(0, 1.15 * max(max(values) for values, _ in rows.values()))
    panel.invert_yaxis()


def draw_parts(panel: Axes, found: dict[str, list[dict]]) -> None:
    """The distance of each objective at the guidance that is best for it, the largest first."""
    rows = {
        NAMES[name]: (distances(runs, BEST), COLORS.get(name, PALE))
        for name, runs in sorted(found.items(), key=lambda one: -statistics.fmean(distances(one[1], BEST)))
    }
    bars(panel, rows)
    finish_panel(panel, "objectives, each at its best guidance", "distance from reconstructions (less is better)")


def draw_guidance(panel: Axes, studies: dict[str, tuple[dict[str, list[dict]], str]]) -> None:
    """The distance against the scale of guidance, for plain AR and reAR; training images -> a study, style of line."""
    for images, (found, style) in studies.items():
        titles = [title for title in found["ar"][0] if title == UNGUIDED or title.startswith("Samples at guidance")]
        scales = [1.0 if title == UNGUIDED else float(title.split()[3].rstrip(",")) for title in titles]
        for variant, color in COLORS.items():
            seeds = [distances(found[variant], title) for title in titles]
            means = [statistics.fmean(values) for values in seeds]
            panel.plot(scales, means, style, color=color, marker="o", label=f"{NAMES[variant]}, {images} images")
            panel.fill_between(scales, list(map(min, seeds)), list(map(max, seeds)), color=color, alpha=0.2)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    finish_panel(panel, "distance against guidance", "scale of guidance")


def draw_post_training(panel: Axes, after_rear: dict[str, list[dict]], after_ar: dict[str, list[dict]]) -> None:
    """The distance without guidance before and after VA-π, from a reAR generator and from a plain AR one."""
    rows = {f"reAR, {PARTS[part]}": (distances(after_rear[part], UNGUIDED), BLUE) for part in PARTS}
    rows |= {f"AR, {PARTS[part]}": (distances(after_ar[part], UNGUIDED), GREY) for part in ("before", "both")}
    bars(panel, rows)
    finish_panel(panel, "post-training, no guidance", "distance from reconstructions (less is better)")


def show_image(panel: Axes, image: np.ndarray, name: str) -> None:
    """An image (uint8 [H, W, 3]) with its name on the left, without axes."""
    panel.imshow(image, interpolation="nearest")
    panel.set_ylabel(name, rotation=0, ha="right", va="center")
    panel.set_xticks([])
    panel.set_yticks([])


def draw_samples(panels: Sequence[Axes], runs: dict[str, Path], guidance: str) -> None:
    """Name -> a folder of samples at several scales: a row of the first two samples of each class."""
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        with np.load(run / "sweep" / f"{guidance}_1" / "samples.npz") as samples:
            images, labels = samples["arr_0"], samples["labels"]
        first = [place for label in np.unique(labels) for place in np.flatnonzero(labels == label)[:2]]
        show_image(panel, np.concatenate(images[first], axis=1), name)


def draw_all(few: Path, every: Path, long: Path, after_ar: Path, to: Path) -> None:
    """Both pictures."""
    figure = Figure(figsize=(12.0, 4.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.0, 1.5))
    panels = above.subplots(1, 3)
    found = results(few)
    draw_parts(panels[0], found)
    draw_guidance(panels[1], {"1200": (found, "-"), "12 000": (results(every), "--")})
    draw_post_training(panels[2], results(long), results(after_ar))
    below.suptitle("samples at guidance 3", fontsize=10)
    draw_samples(below.subplots(2, 1), {NAMES[name]: few / "seed_0" / name for name in COLORS}, "3")
    save_figure(to / "evidence.png", figure)

    figure = Figure(figsize=(12.0, 2.4), layout="constrained")
    draw_samples(figure.subplots(len(PARTS), 1), {name: long / "seed_0" / part for part, name in PARTS.items()}, "1")
    save_figure(to / "evidence_va_pi.png", figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("few", "every", "long", "after_ar"):
        parser.add_argument(name, type=Path, help="workdir of a study")
    parser.add_argument("--to", type=Path, default=Path("docs"), help="a folder")
    draw_all(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
