"""Draws the pictures of docs/method.md again, from embedded images, a tokenizer and a generator.

    python docs/figures.py WORKDIR [--to=docs]

WORKDIR is that of the quickstart. It may be any other that has a tokenizer and a generator of the same sizes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from ml_collections import ConfigDict

from rear_jax import artifacts, generators, grpo, losses, noise
from rear_jax.config.experiments import fashion_mnist
from rear_jax.evaluation.reference import RealImages
from rear_jax.metrics import perceptual
from rear_jax.metrics.codes import nearest_wrong

CLASSES = (9, 3, 8, 2)  # an ankle boot, a dress, a bag and a pullover: of each the first among some held-out images
BLUE, RED, GREY = "#2f6db5", "#c8443c", "#8a8a8a"
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
RATES = (0.0, 0.1, 0.25, 0.5, 1.0)
WRONG = 0.3  # share of the codes that are wrong in the picture of embeddings
GROUP = 6  # samples of an image


class Scene(NamedTuple):
    """What the pictures are of.

    Attributes:
      config: of the networks.
      images: [B, S, S, 3] in [0, 1].
      labels: [B].
      codes: [B, N] of the images.
      codebook: [K, D].
      decode: codes [..., N] -> images [..., S, S, 3] in [0, 1].
      predict: (context [B, N], labels [B]) -> logits [B, N, K].
    """

    config: ConfigDict
    images: jax.Array
    labels: jax.Array
    codes: jax.Array
    codebook: jax.Array
    decode: Callable[[jax.Array], jax.Array]
    predict: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def side(self) -> int:
        """Codes along each side."""
        return int(self.codes.shape[1] ** 0.5)


def open_scene(workdir: Path) -> Scene:
    """The networks of a workdir, and some held-out images; raises RearError where a network is missing."""
    config = fashion_mnist()
    tokenizer = artifacts.load_tokenizer(config, workdir)
    network = generators.build(config, tokenizer.module)
    generator = artifacts.load_generator(config, workdir, tokenizer, network, stage="train")
    held_out, labels = RealImages(config.data, config.data.eval_split, 80), []
    images = np.concatenate(list(held_out.batches(8, labels)))
    shown = [int(np.argmax(np.concatenate(labels) == number)) for number in CLASSES]
    images = jnp.asarray(images[shown], jnp.float32) / 255.0

    def decode(codes: jax.Array) -> jax.Array:
        flat = codes.reshape(-1, codes.shape[-1])
        decoded = tokenizer.module.apply({"params": tokenizer.params}, flat, method="decode")
        return jnp.clip(decoded, 0, 1).reshape(*codes.shape[:-1], *decoded.shape[1:])

    def predict(context: jax.Array, labels: jax.Array) -> jax.Array:
        return network.apply({"params": generator.params}, context, labels).logits

    codes = tokenizer.module.apply({"params": tokenizer.params}, images, method="encode")
    return Scene(config, images, jnp.asarray(CLASSES), codes, tokenizer.codebook(), decode, jax.jit(predict))


def draw_codes(scene: Scene) -> Figure:
    """An image, its codes, and what the decoder makes of them."""
    figure, axes = panels(2, 3, width=2.4)
    for row, (image, codes) in enumerate(zip(scene.images[:2], scene.codes[:2], strict=True)):
        show(axes[row, 0], image)
        show_codes(axes[row, 1], codes.reshape(scene.side, scene.side), len(scene.codebook))
        show(axes[row, 2], scene.decode(codes))
    titles(axes, (f"image, {scene.images.shape[1]} pixels a side", "its codes", "decoded codes"))
    return figure


def draw_exposure(scene: Scene) -> Figure:
    """Images of which only the first codes are true; the generator has drawn the others one after the other."""
    figure, axes = panels(len(CLASSES), len(SHARES))
    count = scene.codes.shape[1]
    for column, share in enumerate(SHARES):
        drawn, true = scene.codes, round(share * count)
        for place in range(true, count):
            logits = scene.predict(drawn, scene.labels)[:, place]
            key = jax.random.fold_in(jax.random.key(5), place)
            drawn = drawn.at[:, place].set(jax.random.categorical(key, logits))
        for row, image in enumerate(scene.decode(drawn)):
            show(axes[row, column], image)
            if 0 < true < count:
                axes[row, column].axhline(share * len(image) - 0.5, color=RED, linewidth=1)
    titles(axes, [f"{share:.0%} true codes" for share in SHARES])
    return figure


def draw_embeddings(scene: Scene) -> Figure:
    """The same share of wrong codes: near ones, any, and far ones."""
    unit = scene.codebook / jnp.maximum(jnp.linalg.norm(scene.codebook, axis=-1, keepdims=True), 1e-8)
    replacements = {
        "wrong by the\nnearest vector": nearest_wrong(scene.codebook)[scene.codes],
        "wrong at\nrandom": jax.random.randint(jax.random.key(3), scene.codes.shape, 0, len(unit)),
        "wrong by the\nfarthest vector": jnp.argmin(unit @ unit.T, axis=-1)[scene.codes],
    }
    wrong = jax.random.uniform(jax.random.key(2), scene.codes.shape) < WRONG
    columns = {"all codes\nright": scene.codes}
    columns |= {name: jnp.where(wrong, others, scene.codes) for name, others in replacements.items()}
    figure, axes = panels(len(CLASSES), len(columns))
    for column, codes in enumerate(columns.values()):
        for row, image in enumerate(scene.decode(codes)):
            show(axes[row, column], image)
    titles(axes, list(columns))
    return figure


def draw_noise(scene: Scene) -> Figure:
    """The limit of the noise rate during training, and contexts at some rates."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.1))
    axes = left.subplots()
    time = np.linspace(0, 1, 101)
    for name, color in (("annealed", BLUE), ("linear", RED), ("uniform", GREY)):
        axes.plot(time, noise.SCHEDULES[name](jnp.asarray(time), 0.5), color=color, label=name)
    axes.set(xlabel="training, from start to end", ylabel="largest noise rate", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(frameon=False)
    grid = right.subplots(2, len(RATES))
    for column, rate in enumerate(RATES):
        read, _ = noise.corrupt(jax.random.key(1), scene.codes[:2], jnp.full(2, rate), len(scene.codebook))
        for row, image in enumerate(scene.decode(read)):
            show(grid[row, column], image)
    titles(grid, [f"rate {rate:g}" for rate in RATES])
    return figure


def draw_layers() -> Figure:
    """The transformer, with the two layers whose output must know the codebook."""
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 12.6), ylim=(-0.1, 5.2))
    axes.axis("off")
    blocks = ("block 1", "block 2", "…", "block 19", "…", "block 24")
    for place, name in enumerate(blocks):
        tapped = name in ("block 1", "block 19")
        box(axes, (0.3 + 2.05 * place, 1.2), (1.6, 0.9), name, BLUE if tapped else GREY)
        if place:
            arrow(axes, (2.05 * place - 0.15, 1.65), (2.05 * place + 0.3, 1.65), "black")
    axes.text(0.3, 0.3, "reads: class, codes 1 … n,\nsome replaced by noise", va="center")
    arrow(axes, (1.1, 0.65), (1.1, 1.2), "black")
    for place, name, words in ((0, "projector", "vector of\ncode n"), (3, "projector", "vector of\ncode n + 1")):
        x = 1.1 + 2.05 * place
        arrow(axes, (x, 2.1), (x, 2.6), RED)
        box(axes, (x - 0.8, 2.6), (1.6, 0.7), name, RED)
        arrow(axes, (x, 3.3), (x, 3.8), RED)
        axes.text(x, 4.3, words, ha="center", va="center", color=RED)
    x = 1.1 + 2.05 * 5
    arrow(axes, (x, 2.1), (x, 3.8), "black")
    axes.text(x, 4.3, "probabilities\nof code n + 1", ha="center", va="center")
    return figure


def draw_va_pi(scene: Scene) -> Figure:
    """Teacher-forced samples of some images, with rewards and advantages."""
    rows = 3
    logits = scene.predict(scene.codes, scene.labels)[:rows]
    samples = scene.decode(grpo.draw_groups(jax.random.key(0), logits, GROUP))  # [B, G, S, S, 3]
    judge = perceptual.load("lite0", scene.config.lpips, option="the reward")
    originals = scene.images[:rows]
    rewards = []
    for image, group in zip(originals, samples, strict=True):
        repeated = jnp.broadcast_to(image, group.shape)
        far = 4 * losses.mean_squared_error(group, repeated) + judge.distance(judge.params, group, repeated)
        rewards.append(-far)
    rewards = jnp.stack(rewards)
    advantages = grpo.group_advantages(rewards)
    figure, axes = panels(rows, GROUP + 2, title_room=0.2)
    for row in range(rows):
        show(axes[row, 0], originals[row])
        show(axes[row, 1], scene.decode(scene.codes[row]))
        for column in range(GROUP):
            place, advantage = axes[row, column + 2], float(advantages[row, column])
            show(place, samples[row, column])
            color = BLUE if advantage > 0 else RED
            place.set_title(f"{float(rewards[row, column]):.2f} ({advantage:+.1f})", fontsize=8, color=color)
    axes[0, 0].set_title("image", fontsize=8)
    axes[0, 1].set_title("decoded codes", fontsize=8)
    return figure


def panels(rows: int, columns: int, *, width: float = 1.35, title_room: float = 0.0) -> tuple[Figure, Any]:
    """A figure with a grid of square pictures."""
    figure = Figure(figsize=(columns * width, rows * (width + title_room) + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def titles(axes: Any, names: Any) -> None:
    """Names the columns of a grid."""
    for place, name in zip(axes[0], names, strict=True):
        place.set_title(name, fontsize=9)


def show(axes: Axes, image: jax.Array) -> None:
    """An image [S, S, 3] in [0, 1], without ticks."""
    axes.imshow(np.asarray(image), interpolation="nearest", vmin=0, vmax=1)
    axes.axis("off")


def show_codes(axes: Axes, codes: jax.Array, size: int) -> None:
    """Codes [h, w] as numbers on colours that name them."""
    numbers = np.asarray(codes)
    colors = np.random.default_rng(0).permutation(size)
    axes.imshow(colors[numbers], cmap="Pastel1", vmin=0, vmax=size)
    axes.axis("off")
    for (y, x), number in np.ndenumerate(numbers):
        axes.text(x, y, str(number), ha="center", va="center", fontsize=7)


def box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], text: str, color: str) -> None:
    """A box with a word in it."""
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle="round,pad=0.02", facecolor="white", edgecolor=color))
    axes.text(corner[0] + size[0] / 2, corner[1] + size[1] / 2, text, ha="center", va="center", color=color)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """An arrow."""
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": color})


def draw_all(workdir: Path, to: Path) -> None:
    """Writes method_*.png into a folder."""
    scene = open_scene(workdir)
    figures = {
        "codes": draw_codes(scene),
        "exposure": draw_exposure(scene),
        "embeddings": draw_embeddings(scene),
        "noise": draw_noise(scene),
        "layers": draw_layers(),
        "va_pi": draw_va_pi(scene),
    }
    for name, figure in figures.items():
        figure.savefig(to / f"method_{name}.png", dpi=100)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=Path, help="folder with tokenizer/ and generator/ of the quickstart's sizes")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    arguments = parser.parse_args()
    draw_all(arguments.workdir, arguments.to)


if __name__ == "__main__":
    main()
