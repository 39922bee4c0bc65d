"""`config.data.num_classes = 0`: the training images say how many classes there are."""

import json
from pathlib import Path

import numpy as np
import pytest

from rear_jax import jobs
from rear_jax.data.sources import open_split, with_class_count
from rear_jax.errors import RearError
from rear_jax.jobs import study
from tests import toy
from tests.toy_pairs import encoded, picture, write_kind


def folders(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(index)))
    return root


def asking(source: str, path: Path | str, **changes):
    return toy.config(
        **{"data__source": source, "data__path": str(path), "data__train_split": "train", "data__num_classes": 0}
        | changes
    )


def test_the_number_is_that_of_the_training_split(tmp_path: Path):
    folders(tmp_path, "train/ant/0.png", "train/bee/0.png", "train/cat/0.png", "test/ant/0.png")
    config = asking("folder", tmp_path)
    assert with_class_count(config).data.num_classes == 3
    assert config.data.num_classes == 0
    assert open_split(with_class_count(config).data, "test").num_classes == 3


def test_other_sources_are_asked_too(tmp_path: Path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((2, 8, 8, 3), np.uint8), train_labels=[4, 0])
    assert with_class_count(asking("arrays", tmp_path / "a.npz")).data.num_classes == 5
    assert with_class_count(asking("fashion_mnist", "")).data.num_classes == 10
    assert with_class_count(asking(*write_kind("txt", tmp_path))).data.num_classes == 1  # captions


def test_a_number_that_is_given_stays(tmp_path: Path):
    config = asking("folder", tmp_path / "nowhere", data__num_classes=7)
    assert with_class_count(config) is config


def test_images_that_are_not_there_are_one_line(tmp_path: Path):
    with pytest.raises(RearError, match=r"nowhere' does not exist.*; or set config\.data\.num_classes"):
        jobs.check_all(("plan",), asking("folder", tmp_path / "nowhere"), tmp_path)
    with pytest.raises(RearError, match="unknown image source 'folders'"):
        jobs.check_all(("tokenizer",), asking("folders", tmp_path), tmp_path)


def test_a_number_out_of_range_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((1, 8, 8, 3), np.uint8), train_labels=[2**30])
    with pytest.raises(RearError, match=r"config\.data\.num_classes = 1073741825: give a whole number"):
        jobs.check_all(("tokenizer",), asking("arrays", tmp_path / "a.npz"), tmp_path)


def test_jobs_get_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is what a checkpoint is saved with, so that a later run may give it."""
    seen = []
    monkeypatch.setitem(
        jobs.JOBS,
        "tokenize",
        jobs.Job(
            lambda config, _: seen.append(config.data.num_classes), lambda *arguments: seen.append(arguments[0].data)
        ),
    )
    folders(tmp_path, "train/ant/0.png", "train/bee/0.png", "test/ant/0.png")
    jobs.run_all(("tokenize",), asking("folder", tmp_path), tmp_path / "workdir")
    assert (seen[0].num_classes, seen[1]) == (2, 2)
    folders(tmp_path, "train/cat/0.png")  # the images have changed since
    jobs.run_all(("tokenize",), asking("folder", tmp_path), tmp_path / "workdir")
    assert seen[-1] == 3


def test_a_variant_of_a_study_may_ask(tmp_path: Path):
    folders(tmp_path, "train/ant/0.png", "train/bee/0.png")
    config = toy.config()
    variant = study._changed(config, asking("folder", tmp_path).copy_and_resolve_references(), "x")
    assert variant.data.num_classes == 2
    assert json.loads(variant.to_json_best_effort())["data"]["source"] == "folder"
