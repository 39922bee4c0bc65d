"""`--job=inspect`: what is in the images."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rear_jax import jobs
from rear_jax.data import inspection
from rear_jax.data.sources import open_source
from rear_jax.data.sources.decoding import decode, examine
from rear_jax.errors import RearError
from tests import toy
from tests.test_decoding import modes
from tests.toy_pairs import CAPTIONS, encoded, picture, write_kind
from tests.toy_sources import FORMS, LABELS, NAMED, NAMES, pictures, saved, write_form


def run(workdir: Path, source: str, path: str, **changes) -> dict:
    given = {"data__source": source, "data__path": path, "data__train_split": "train", "data__num_classes": 0}
    jobs.run_all(("inspect",), toy.config(**given | changes), workdir)
    return json.loads((workdir / "inspect.json").read_text())["splits"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_told_the_same(form: str, tmp_path: Path):
    files = pictures()
    files[4], files[5] = b"", files[5][:100]
    name, path = write_form(form, tmp_path / "set", files)
    found = run(tmp_path / "workdir", name, path, data__eval_split="train")["train"]
    assert (found["num_images"], found["looked_at"], found["num_classes"], found["num_broken"]) == (7, 7, 3, 2)
    assert found["classes"] == [
        {"label": label, "name": NAMES[label] if form in NAMED else str(label), "images": images, "broken": broken}
        for label, images, broken in ((0, 2, 0), (1, 1, 0), (2, 2, 2))
    ]
    assert found["short_side"] == {"least": 8, "median": 8, "most": 8}
    assert found["sizes"]["8 x 12"] == 1
    assert (found["formats"], found["modes"]) == ({"PNG": 5}, {"RGB": 5})
    assert found["bytes"] == sum(map(len, files)) - 100
    assert len(found["broken"]) == 2
    assert all("is not a readable image" in reason for reason in found["broken"])


def test_page_and_sheet(tmp_path: Path):
    name, path = write_form("folder", tmp_path / "set", pictures())
    write_form("folder", tmp_path / "set", pictures()[:2], labels=(1, 2), split="test")
    found = run(tmp_path, name, path, data__image_size=8, data__num_classes=5)
    assert (found["train"]["num_images"], found["test"]["num_images"]) == (7, 2)
    page = (tmp_path / "inspect.md").read_text()
    assert "7 images, 7 of them looked at; 0 are broken." in page
    assert "0 images are smaller than config.data.image_size = 8" in page
    assert "3 classes. But config.data.num_classes is 5." in page
    assert "| cat | 2 | 4 | 0 |" in page
    assert "](inspect_train.png)" in page
    with Image.open(tmp_path / "inspect_train.png") as sheet:
        pixels = np.asarray(sheet)
    side, columns = inspection.SHOWN_SIDE, LABELS.count(2)
    assert pixels.shape[0] == 3 * side + 4  # a row a class, two pixels between them
    assert pixels.shape[1] > columns * side
    assert (pixels[: side // 2, -side // 2 :] == 255).all()  # the first class has two images
    assert (pixels[-side // 2 :, -side // 2 :] != 255).any()


def test_modes_turns_and_frames_are_counted(tmp_path: Path):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [file for file, _ in modes().values()]
    files.append(saved(Image.fromarray(picture(0)), "JPEG", exif=turned))
    source = open_source(*write_form("folder", tmp_path, files, labels=[0] * len(files)), "train")
    found = inspection.inspect(source, 0, "x")
    assert found.num_broken == 0
    assert found.counts_of("mode").keys() >= {"L", "P", "LA", "RGBA", "1", "CMYK", "RGB"}
    assert found.counts_of("turned")["True"] == found.counts_of("moving")["True"] == 1
    for file in files:
        np.testing.assert_array_equal(examine(file, "x")[0], decode(file, "x"))


def test_some_images_are_enough(tmp_path: Path):
    found = run(tmp_path, *write_form("folder", tmp_path / "set", pictures()), inspect__num_images=3)["train"]
    assert (found["num_images"], found["looked_at"]) == (7, 3)


def test_captions_and_arrays(tmp_path: Path):
    name, path = write_kind("jsonl", tmp_path)
    found = run(tmp_path / "a", name, path)["train"]
    assert (found["captioned"], found["num_classes"], found["num_images"]) == (True, None, len(CAPTIONS))
    assert "classes" not in found
    assert (tmp_path / "a" / "inspect_train.png").is_file()
    found = run(tmp_path / "b", "fashion_mnist", "", inspect__num_images=40, data__eval_split="test")["train"]
    assert [one["name"] for one in found["classes"]][:2] == ["T-shirt/top", "Trouser"]
    assert found["formats"] == {"array": 40}


def test_held_out_images_that_are_not_there_are_told(tmp_path: Path):
    found = run(tmp_path, *write_form("folder", tmp_path / "set", pictures()), data__eval_split="val")
    assert "has no folder 'val'" in found["val"]["error"]
    assert "The held-out images cannot be opened" in (tmp_path / "inspect.md").read_text()


def test_nothing_to_inspect_is_one_line(tmp_path: Path):
    with pytest.raises(RearError, match="nowhere' does not exist"):
        run(tmp_path, "folder", str(tmp_path / "nowhere"))
    assert not (tmp_path / "inspect.json").exists()


def test_only_broken_images(tmp_path: Path):
    found = run(tmp_path, *write_form("folder", tmp_path / "set", [b"", b""], labels=(0, 1)))["train"]
    assert (found["num_broken"], found["short_side"]) == (2, {})
    assert not (tmp_path / "inspect_train.png").exists()


def test_names_cannot_spoil_the_page(tmp_path: Path):
    (tmp_path / "set" / "train" / "a | b\n# c").mkdir(parents=True)
    (tmp_path / "set" / "train" / "a | b\n# c" / "0.png").write_bytes(encoded(picture(0)))
    run(tmp_path, "folder", str(tmp_path / "set"))
    assert "| a \\| b # c | 0 | 1 | 0 |" in (tmp_path / "inspect.md").read_text()
