"""A folder of images without classes, with and without splits."""

from pathlib import Path

import numpy as np
import pytest

from rear_jax.config import default
from rear_jax.data.sources import open_source, open_split, with_class_count
from rear_jax.data.sources.interface import HeldOut
from rear_jax.errors import RearError
from tests.toy_pairs import encoded, picture


def fill(root: Path, names) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / name).write_bytes(encoded(picture(0)))
    return root


def data_of(path: Path, **changes):
    config = default()
    config.data.update({"source": "flat", "path": str(path), "num_classes": 0, "held_out_share": 0.25} | changes)
    return with_class_count(config).data


def names_of(source) -> list[str]:
    return [file.name for file in source.files]


def test_every_image_is_in_one_split(tmp_path: Path):
    names = [f"{number:03}.png" for number in range(60)]
    data = data_of(fill(tmp_path, names))
    assert data.num_classes == 1
    training, held_out = open_split(data, "train"), open_split(data, "validation")
    assert sorted(names_of(training) + names_of(held_out)) == names
    assert 6 <= len(held_out) <= 24
    image, label = held_out[0]
    assert label == 0
    np.testing.assert_array_equal(image, picture(0))


def test_added_images_leave_the_others_where_they_are(tmp_path: Path):
    data = data_of(fill(tmp_path, [f"{number}.png" for number in range(0, 40, 2)]))
    before = {split: set(names_of(open_split(data, split))) for split in ("train", "validation")}
    fill(tmp_path, [f"{number}.png" for number in range(1, 40, 2)])
    for split, names in before.items():
        assert names < set(names_of(open_split(data, split)))


def test_share_and_seed_decide():
    names = [f"{number}.jpg" for number in range(4000)]

    def held_out(share: float, seed: int = 0) -> set[str]:
        rule = HeldOut(("train", "val"), share, seed)
        return {name for name in names if rule.takes("val", name)}

    for share in (0.01, 0.25, 0.9):
        assert abs(len(held_out(share)) / 4000 - share) < 0.025
    assert held_out(0.1) < held_out(0.2)  # a larger share holds out more, not others
    assert held_out(0.1) != held_out(0.1, seed=1)
    assert held_out(0.1) == {name for name in names if not HeldOut(("train", "val"), 0.1).takes("train", name)}
    assert all(HeldOut(("", ""), 0.1).takes("", name) for name in names)


def test_folders_of_splits_are_taken_where_they_are(tmp_path: Path):
    fill(tmp_path / "train", ["0.png", "1.png"])
    data = data_of(tmp_path)
    assert names_of(open_split(data, "train")) == ["0.png", "1.png"]
    with pytest.raises(RearError, match="has no folder 'validation'"):
        open_split(data, "validation")
    fill(tmp_path / "validation", ["0.png"])
    assert names_of(open_split(data, "validation")) == ["0.png"]
    assert len(open_source("flat", str(tmp_path / "train"), "")) == 2


def test_folders_that_do_not_fit_are_refused(tmp_path: Path, caplog):
    fill(tmp_path / "ant", ["0.png"])
    with pytest.raises(RearError, match=r"holds no \.png .*config\.data\.source = 'folder' for class folders"):
        open_source("flat", str(tmp_path), "")
    fill(tmp_path, ["0.png", ".1.png", "notes.txt"])
    assert len(open_source("flat", str(tmp_path), "")) == 1
    assert "left out 2 files or folders" in caplog.text  # notes.txt and ant
    data = data_of(tmp_path, held_out_share=1e-9)
    with pytest.raises(RearError, match=r"none of the 1 images in .* falls to the split 'validation'"):
        open_split(data, "validation")
    with pytest.raises(RearError, match="is no folder"):
        open_source("flat", str(tmp_path / "0.png"), "")
