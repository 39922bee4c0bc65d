"""The job that describes images: from photos to pairs that the source `imagefolder` reads, and what can go wrong."""

import json
import logging
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rear_jax import config as configs
from rear_jax import jobs
from rear_jax.data.sources import open_split
from rear_jax.errors import RearError
from rear_jax.jobs import describe
from rear_jax.text.janus_vocabulary import JanusVocabulary
from tests import toy, toy_understanding

SHAPES = {"a.png": (40, 30), "b.jpg": (32, 32), "deep/c.png": (9, 70), "d.png": (64, 20), "e.png": (33, 31)}


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """A folder as a hub hands it out; do not change it."""
    return toy_understanding.folder(tmp_path_factory.mktemp("hub") / "janus")


@pytest.fixture
def photos(tmp_path):
    """A folder of five photos, one of them in a folder of its own."""
    rng = np.random.default_rng(0)
    for name, (height, width) in SHAPES.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(file)
    return tmp_path / "photos"


def config(janus, photos, **changes):
    made = configs.default()
    made.describe.update(images=str(photos), weights=str(janus), max_tokens=6, batch_size=2, dtype="float32")
    made.data.max_broken_share = 0.0
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return made


def run(made, workdir):
    """As the command does it: the check first."""
    jobs.JOBS["describe"].check(made, workdir, ())
    jobs.JOBS["describe"].run(made, workdir)


def refused(made, workdir) -> str:
    with pytest.raises(RearError) as error:
        run(made, workdir)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def squares(monkeypatch) -> list[str]:
    """Names of the images that are decoded, as they are."""
    seen = []
    square = describe._square
    monkeypatch.setattr(describe, "_square", lambda images, name, size: seen.append(name) or square(images, name, size))
    return seen


def rows(photos) -> dict[str, str]:
    lines = (photos / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


@pytest.mark.slow
def test_photos_become_pairs(janus, photos, tmp_path):
    made = config(janus, photos)
    run(made, tmp_path / "work")
    found = rows(photos)
    assert list(found) == sorted(SHAPES)
    assert len(set(found.values())) > 2
    made.data.update(source="imagefolder", path=str(photos.parent), train_split="photos")
    source = open_split(made.data, "photos")
    assert [source.caption(n) for n in range(len(source))] == list(found.values())
    assert [source[n][0].shape[:2] for n in range(len(source))] == [SHAPES[name] for name in found]

    one = photos.parent / "one"
    one.mkdir()
    shutil.copy(photos / "d.png", one)
    run(config(janus, one), tmp_path / "other")
    assert rows(one) == {"d.png": found["d.png"]}  # whatever else was in its batch


@pytest.mark.slow
def test_a_run_that_was_cut_short_goes_on(janus, photos, tmp_path, squares, monkeypatch):
    made = config(janus, photos)
    run(made, tmp_path / "whole")
    wanted = (photos / "metadata.jsonl").read_bytes()
    (photos / "metadata.jsonl").unlink()
    squares.clear()

    add = describe.Descriptions.add

    def die(self, captions):
        add(self, captions)
        raise KeyboardInterrupt

    monkeypatch.setattr(describe.Descriptions, "add", die)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "work")
    monkeypatch.setattr(describe.Descriptions, "add", add)
    assert not (photos / "metadata.jsonl").exists()
    with (tmp_path / "work" / "descriptions" / "photos" / "captions.jsonl").open("a") as file:
        file.write('{"d.png": "torn of')
    squares.clear()
    run(made, tmp_path / "work")
    assert sorted(squares) == sorted(SHAPES)[2:]  # the first batch is not read again
    assert (photos / "metadata.jsonl").read_bytes() == wanted

    squares.clear()
    run(made, tmp_path / "work")
    assert squares == []
    assert (photos / "metadata.jsonl").read_bytes() == wanted


@pytest.mark.slow
def test_new_photos_are_added(janus, photos, tmp_path, squares):
    run(config(janus, photos), tmp_path)
    before = rows(photos)
    shutil.copy(photos / "a.png", photos / "z.png")
    squares.clear()
    run(config(janus, photos), tmp_path)
    assert squares == ["z.png"]
    assert rows(photos) == before | {"z.png": before["a.png"]}


def test_a_strangers_metadata_stays(janus, photos, tmp_path):
    for name in ("metadata.jsonl", "metadata.csv"):
        (photos / name).write_text("mine")
        assert f"{name} is there, and this run did not write it" in refused(config(janus, photos), tmp_path)
        assert (photos / name).read_text() == "mine"
        (photos / name).unlink()
    run(config(janus, photos), tmp_path)
    with (photos / "metadata.jsonl").open("a") as file:
        file.write("mine\n")
    assert "this run did not write it" in refused(config(janus, photos), tmp_path)
    assert (photos / "metadata.jsonl").read_text().endswith("mine\n")


@pytest.mark.slow
def test_captions_of_another_recipe_are_not_mixed(janus, photos, tmp_path):
    run(config(janus, photos), tmp_path)
    told = refused(config(janus, photos, describe__question="What is it?"), tmp_path)
    assert "was begun with question 'Describe this image in one sentence.', not 'What is it?'" in told
    other = shutil.copytree(janus, tmp_path / "janus")
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"language_model.lm_head.weight": -tensors["language_model.lm_head.weight"]}, other / "m.s")
    (other / "m.s").rename(other / "model.safetensors")
    assert "was begun with weights" in refused(config(other, photos), tmp_path)


@pytest.mark.slow
def test_sampling_depends_on_the_seed_and_not_on_the_batch(janus, photos, tmp_path):
    found = []
    for number, (seed, batch_size) in enumerate([(0, 1), (0, 3), (1, 3)]):
        made = config(janus, photos, describe__temperature=1.0, describe__batch_size=batch_size, seed=seed)
        run(made, tmp_path / str(number))
        found.append(rows(photos))
        (photos / "metadata.jsonl").unlink()
    assert found[0] == found[1] != found[2]


def test_broken_photos_are_named_once_and_left_out(janus, photos, tmp_path, caplog):
    (photos / "b.jpg").write_bytes(b"no picture")
    told = refused(config(janus, photos), tmp_path / "strict")
    assert "b.jpg is not a readable image" in told
    assert "1 of 5 are broken" in told
    with caplog.at_level(logging.WARNING):
        run(config(janus, photos, data__max_broken_share=0.2), tmp_path / "work")
    (line,) = [line for line in caplog.messages if "b.jpg" in line]
    assert line.endswith("; replace or remove it; it is left out")
    assert list(rows(photos)) == sorted(SHAPES.keys() - {"b.jpg"})


def test_a_name_that_no_row_can_give(janus, photos, tmp_path):
    (photos / "a.png").rename(photos / " a.png")
    assert "/ a.png' has a name that metadata.jsonl cannot give; rename it" in refused(config(janus, photos), tmp_path)


def test_a_photo_that_leaves_the_answer_empty_is_left_out(janus, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(JanusVocabulary, "text", lambda self, ids: "")
    assert "a.png got an empty caption" in refused(config(janus, photos), tmp_path)


def without(janus, place, *keys):
    """A copy of the folder without some tensors."""
    shutil.copytree(janus, place)
    tensors = load_file(place / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(keys)}, place / "model.safetensors")
    return place


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": ""}, "config.describe.images = '' is no folder"),
            ({"images": "/nowhere"}, "config.describe.images = '/nowhere' is no folder"),
            ({"weights": ""}, "config.describe.weights = '' does not exist"),
            ({"weights": "/nowhere.bin"}, "config.describe.weights = '/nowhere.bin' does not exist"),
            ({"vocabulary": "/nowhere.json"}, "no vocabulary /nowhere.json"),
            ({"dtype": "float16"}, "answers in bfloat16 or float32, not in 'float16'"),
            ({"question": " \n"}, "config.describe.question is empty"),
            ({"question": "why " * 20_000}, "together 16384 at most; shorten it"),
            ({"max_tokens": 16_384}, "together 16384 at most; shorten it"),
        ],
    )
    def test_settings(self, janus, photos, tmp_path, changes, message):
        made = config(janus, photos, **{f"describe__{key}": value for key, value in changes.items()})
        assert message in refused(made, tmp_path)
        assert not (tmp_path / "descriptions").exists()

    def test_a_folder_without_photos(self, janus, tmp_path):
        (tmp_path / "photos").mkdir()
        assert "holds no images" in refused(config(janus, tmp_path / "photos"), tmp_path)

    def test_a_checkpoint_that_cannot_see(self, janus, photos, tmp_path):
        blind = without(janus, tmp_path / "blind", "vision_model.", "aligner.")
        assert "cannot answer about images: it lacks vision_model" in refused(config(blind, photos), tmp_path)
        mute = without(janus, tmp_path / "mute", "language_model.lm_head.")
        assert "it lacks language_model.lm_head.weight" in refused(config(mute, photos), tmp_path)
        half = without(janus, tmp_path / "half", "aligner.layers.2.bias")
        assert "1 missing: aligner.layers.2.bias" in refused(config(half, photos), tmp_path)

    def test_another_vocabulary(self, janus, photos, tmp_path):
        tokenizer = json.loads((janus / "tokenizer.json").read_text())
        for token in tokenizer["added_tokens"]:
            if token["content"] == "<image_placeholder>":
                token["content"] = "<other>"
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        made = config(janus, photos, describe__vocabulary=str(tmp_path / "tokenizer.json"))
        assert "has no special token <image_placeholder>" in refused(made, tmp_path)
        small = shutil.copytree(janus, tmp_path / "small")
        tensors = load_file(small / "model.safetensors")
        tables = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        save_file(tensors | {key: tensors[key][:-4] for key in tables}, tmp_path / "small.safetensors")
        (tmp_path / "small.safetensors").rename(small / "model.safetensors")
        assert "give the vocabulary of that network" in refused(config(small, photos), tmp_path)

    @pytest.mark.slow
    def test_damaged_notes(self, janus, photos, tmp_path):
        run(config(janus, photos), tmp_path)
        kept = tmp_path / "descriptions" / "photos" / "captions.jsonl"
        kept.write_text("[1]\n" + kept.read_text())
        assert "captions.jsonl, byte 0 is damaged" in refused(config(janus, photos), tmp_path)
        (tmp_path / "descriptions" / "photos" / "recipe.json").write_text("{")
        assert "recipe.json is damaged" in refused(config(janus, photos), tmp_path)


def flags(janus, photos) -> list[str]:
    settings = {"images": photos, "weights": janus, "max_tokens": 6, "batch_size": 1, "dtype": "float32"}
    return ["--job=describe", *(f"--config.describe.{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
def test_kill_and_several_devices(janus, photos, tmp_path):
    """The same file after kill -9 and on two devices, and a fault is one line."""
    run(config(janus, photos), tmp_path / "here")
    wanted = (photos / "metadata.jsonl").read_bytes()
    (photos / "metadata.jsonl").unlink()
    for number in range(40):
        shutil.copy(photos / "a.png", photos / f"x{number:02d}.png")
    kept = tmp_path / "killed" / "descriptions" / "photos" / "captions.jsonl"
    process = toy.start(tmp_path / "killed", *flags(janus, photos))
    while not (kept.exists() and kept.read_bytes().count(b"\n") > 1):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (photos / "metadata.jsonl").exists()
    for workdir, devices in (("killed", 1), ("two", 2)):
        done = toy.finish(tmp_path / workdir, *flags(janus, photos), devices=devices)
        assert done.returncode == 0, done.stderr
        assert (photos / "metadata.jsonl").read_bytes().startswith(wanted)
        assert len(rows(photos)) == 45
        (photos / "metadata.jsonl").unlink()
    (photos / "b.jpg").write_bytes(b"no picture")
    done = toy.finish(tmp_path / "fault", *flags(janus, photos))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (done.returncode, "b.jpg is not a readable image" in line) == (1, True)
