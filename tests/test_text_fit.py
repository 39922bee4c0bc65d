"""CLIP score and HPSv2 of a set that was drawn for prompts: which image goes with which text."""

import numpy as np
import pytest

from rear_jax.data.archive import ImageArchive
from rear_jax.data.prompts import Prompt, write_prompts
from rear_jax.errors import RearError
from rear_jax.evaluation import text_fit
from tests import toy


class Brightness:
    """Stands for a scorer: a text names a level, and an image fits it the better the nearer it is."""

    def scores(self, batches):
        for images, texts in batches:
            assert len(images) == len(texts)
            yield 1 - np.abs(images.mean(axis=(1, 2, 3)) - np.array(list(map(float, texts)))) / 100


LEVELS = (10, 50, 90)


@pytest.fixture
def archive(tmp_path):
    """Two images of each of three levels, the last one wrong by 10."""
    levels = np.repeat(LEVELS, 2) + np.array([0, 0, 0, 0, 0, 10])
    images = np.broadcast_to(levels[:, None, None, None], (6, 4, 4, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images, labels=np.repeat(np.arange(3), 2))
    return ImageArchive(tmp_path / "samples.npz", remedy="")


def scores_of(archive, categories=("", "", "")):
    prompts = [Prompt(str(level), category) for level, category in zip(LEVELS, categories, strict=True)]
    scorers = {text_fit.CLIP: Brightness(), text_fit.HPS: Brightness()}
    return text_fit.scores(scorers, archive, archive.read("labels"), prompts, 4)


def test_each_image_goes_with_its_prompt(archive):
    found = scores_of(archive)
    assert found == {"CLIP": pytest.approx(1 - 0.1 / 6), "HPSv2": pytest.approx(1 - 0.1 / 6)}


def test_prompts_of_hpsv2_give_the_table_of_its_benchmark(archive):
    found = scores_of(archive, ("anime", "anime", "photo"))
    assert found["HPSv2 anime"] == pytest.approx(100)
    assert found["HPSv2 photo"] == pytest.approx(95)
    assert found["HPSv2 overall"] == pytest.approx(100 - 10 / 6)
    assert "HPSv2 anime" not in scores_of(archive, ("anime", "anime", "other"))


def test_prompts_are_those_beside_the_samples(tmp_path):
    assert text_fit.prompts_in(tmp_path) == []
    write_prompts(tmp_path / "prompts.jsonl", [Prompt("a dog")])
    assert [prompt.text for prompt in text_fit.prompts_in(tmp_path)] == ["a dog"]


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_files_that_are_not_there_are_named_first(name):
    config = toy.config()
    text_fit.check(config)
    assert text_fit.scorers(config) == {}
    config[name].weights = "none.pt"
    for step in (text_fit.check, text_fit.scorers):
        with pytest.raises(RearError, match=r"none\.pt"):
            step(config)
