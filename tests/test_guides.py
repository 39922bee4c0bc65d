"""The commands of the guides at toy size: somebody who types them in their order gets what the page promises."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rear_jax import jobs
from rear_jax.config.ranges import checked
from tests import toy
from tests.test_docs import COMMAND, arguments_of, found, parse
from tests.toy import ROOT

# what makes any config of a guide small enough; it comes after the settings of the command and wins
SMALL = """
    data.image_size=32 tokenizer.codebook_size=16 tokenizer.z_channels=4 tokenizer.hidden_channels=8
    tokenizer.channel_mult=(1,1,1,1) tokenizer.num_res_blocks=1 tokenizer_training.perceptual_weight=0.0
    tokenizer_training.loop.steps=2 tokenizer_training.loop.batch_size=4 tokenizer_training.loop.picture_every=0
    tokenizer_training.loop.checkpoint_every=2 tokenizer_training.optimizer.warmup_steps=1 codes.num_shards=2
    codes.augmentation='center' model.width=16 model.depth=2 model.heads=2 model.mlp_width=32 model.dtype='float32'
    method.projector_width=16 train.loop.steps=2 train.loop.batch_size=4 train.loop.picture_every=0
    train.loop.checkpoint_every=2 train.optimizer.warmup_steps=1 sample.batch_size=4 evaluate.feature_size=32
    evaluate.num_reference=8
"""


def small(*more: str) -> list[str]:
    """Flags that make a config small."""
    return [f"--config.{setting}" for setting in (*shlex.split(SMALL.replace("'", "")), *more)]


def follow(page: str, folder: Path, names: dict[str, str], *more: str, only: str = "") -> None:
    """Runs the commands of a page, or those alone that have a word, in a folder.

    `names` says what takes the place of a value of a flag, such as a published file; `more` are further settings.
    """
    for case in found(COMMAND, [ROOT / "docs" / page]):
        if only in case.values[0]:
            words = (word.partition("=") for word in arguments_of(case.values[0]))
            given = [
                f"{flag}={names.get(value, value)}".replace("=configs/", f"={ROOT}/configs/")
                for flag, _, value in words
            ]
            values = parse([*given, *small(*more)])
            workdir = (folder / values.workdir).resolve()
            workdir.mkdir(parents=True, exist_ok=True)  # as the command does
            jobs.run_all(values.job, checked(values.config), workdir)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with class folders of photos of several sizes in it, which is also the current one."""
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 6)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / "photos" / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 100, (20 + index, 24, 3)) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_own_photos(photos: Path):
    follow(
        "own_photos.md",
        photos,
        {"maskgit-vqgan-imagenet-f16-256.bin": "runs/photos/tokenizer", "1000": "8", "100": "4"},
    )
    made = {str(file.relative_to(photos / "runs")) for file in (photos / "runs").glob("*/*")}
    promised = ("photos/inspect.md", "photos/reconstructions.png", "photos/samples.png", "large/samples.png")
    assert {*promised, "scored/report.md"} <= made


@pytest.mark.slow
def test_published_weights_are_trained_further(photos: Path, trained: Path, caplog):
    files = {"maskgit-vqgan-imagenet-f16-256.bin": "tokenizer.bin", "1000": "8", "16": "2"}
    for kind, name in (("tokenizer", "tokenizer.bin"), ("generator", "rar_b.bin")):
        toy.run(photos, "convert", convert__source=str(trained / kind), convert__export=str(photos / name))
    follow("fine_tuning.md", photos, files, "plan.compiles=0", "plan.quick=True")
    promised = ("plan/plan.md", "tuned/generator", "tuned/samples.png", "tuned_scored/report.md")
    assert all((photos / "runs" / name).exists() for name in promised)
    assert "rar_b.bin has 10 classes and config.data.num_classes is 2: these start fresh" in caplog.text
    with np.load(photos / "runs" / "tuned" / "samples.npz") as samples:
        assert samples["labels"].tolist() == [0, 0]  # two cats


@pytest.mark.slow
def test_pictures_are_drawn_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from docs import figures

    monkeypatch.setattr(figures, "fashion_mnist", toy.config)
    figures.draw_all(trained, tmp_path)
    drawn = {file.name for file in tmp_path.glob("*.png")}
    assert drawn == set(re.findall(r"\]\((method_\w+\.png)\)", (ROOT / "docs" / "method.md").read_text()))


def test_pictures_are_small():
    sizes = {file.name: file.stat().st_size for file in (ROOT / "docs").glob("method_*.png")}
    assert len(sizes) == 6
    assert max(sizes.values()) < 100_000, sizes


def templates() -> list[str]:
    """Every text in the code, with … for what is put into it."""
    texts = []
    for file in (ROOT / "rear_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


MESSAGES = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def code() -> list[str]:
    return templates()


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_still_occur(message: str, code: list[str]):
    """Its words occur in one text of the code, in their order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in code)


def test_there_are_twenty_messages_or_more():
    assert len(set(MESSAGES)) >= 20


LAUNCHES = found(re.compile(r"^launch/\w+\.sh .*$", re.MULTILINE), [ROOT / "launch" / "README.md"])


@pytest.mark.parametrize("command", LAUNCHES)
def test_launches_are_what_the_scripts_take(command: str):
    script, *arguments = shlex.split(command)
    done = subprocess.run([ROOT / script, "--dry-run", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout
