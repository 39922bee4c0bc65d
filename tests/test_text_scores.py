"""The CLIP score and HPSv2: their arithmetic by hand, and what the scorers of files make of images and texts."""

import functools
import gzip
from pathlib import Path

import jax
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.metrics import clip_files, text_scores
from rear_jax.metrics.clip import CLIP, Tower
from rear_jax.metrics.clip_preprocess import clip_pixels, hps_pixels
from rear_jax.text import clip_vocabulary
from rear_jax.weights import torch_writer

WORDS = clip_vocabulary.ids_of([("a", "t</w>"), ("c", "at</w>")])
NETWORKS = {
    "clip": CLIP(8, 16, 8, Tower(768, 1, 12), Tower(64, 1, 1), len(WORDS), 12, "quick_gelu"),
    "hps": CLIP(8, 16, 8, Tower(1280, 1, 16), Tower(64, 1, 1), len(WORDS), 12, "gelu"),
}
LOADERS = {"clip": text_scores.load_clip, "hps": text_scores.load_hps}
TEXTS = ["A cat", "at", ""]


@functools.cache
def params(name: str):
    draw = np.random.default_rng(0).standard_normal
    shapes = clip_files.param_shapes(NETWORKS[name])
    return jax.tree.map(lambda leaf: 0.2 * draw(leaf.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("clip")
    for name in NETWORKS:
        torch_name = clip_files.OPEN_CLIP.torch_name
        torch_writer.save(folder / f"{name}.pt", params(name), torch_name, under="state_dict")
    write_vocabulary(folder / "words.txt.gz", ["a t</w>", "c at</w>"])
    return {file.name.partition(".")[0]: str(file) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def scorers(files) -> dict[str, text_scores.TextScorer]:
    return {name: load(files[name], files["words"]) for name, load in LOADERS.items()}


def write_vocabulary(file: Path, merges: list[str]) -> str:
    file.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode()))
    return str(file)


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 30, 3), np.uint8)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.float64(a), np.float64(b)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))


def test_cosines_by_hand():
    a, b = np.float32([[3, 4], [1, 0], [2, 0]]), np.float32([[4, 3], [0, 5], [-1, 0]])
    np.testing.assert_allclose(text_scores.cosines(a, b), [0.96, 0.0, -1.0], atol=1e-6)
    np.testing.assert_allclose(text_scores.clip_score(a, b), -0.04 / 3, atol=1e-6)


def test_benchmark_by_hand():
    of_groups = np.repeat(np.float32([0.1, 0.3]), 80)
    found = text_scores.hps_benchmark({"anime": of_groups, "photo": np.float32([*of_groups, 0.8])})
    assert found == pytest.approx({"anime": 20.0, "photo": 40.0, "overall": 100 * (32 * 2 + 0.8) / 321})
    with pytest.raises(RearError, match=r"no images of the style 'photo'"):
        text_scores.hps_benchmark({"anime": of_groups, "photo": of_groups[:0]})
    with pytest.raises(RearError, match=r"has no images; draw"):
        text_scores.hps_benchmark({})


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_cosines_of_what_the_network_sees(name, files, scorers):
    scorer = scorers[name]
    pixels = clip_pixels(images(), 16) if name == "clip" else hps_pixels(images() / np.float32(255), 16)
    ids = clip_vocabulary.load(files["words"], context_length=12).encode(TEXTS)
    seen = np.diagonal(jax.jit(NETWORKS[name].apply)({"params": params(name)}, pixels, ids))
    np.testing.assert_allclose(scorer.score(images(), TEXTS), seen, atol=1e-5)
    features = next(scorer.image_features([images()])), scorer.text_features(TEXTS)
    np.testing.assert_allclose(cosine(*features), seen, atol=1e-5)
    assert seen.std() > 1e-3


def test_a_stream_is_scored_batch_by_batch(scorers):
    scorer = scorers["clip"]
    whole = scorer.score(images(), TEXTS)
    parts = list(scorer.scores((images()[i : i + 2], TEXTS[i : i + 2]) for i in (0, 2)))
    assert [len(part) for part in parts] == [2, 1]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    with pytest.raises(RearError, match=r"CLIP of width 768 .* wants a text for each image, not 3 for 2"):
        scorer.score(images(2), TEXTS)
    for wrong in (images() / 255, images()[0], images()[..., :1]):
        with pytest.raises(RearError, match=r"wants images as uint8 \[B, H, W, 3\], not "):
            scorer.score(wrong, TEXTS)


def test_more_texts_than_are_encoded_at_once(scorers):
    texts = [f"a {'cat ' * (i % 9)}" for i in range(text_scores.TEXTS_AT_ONCE + 3)]
    found = scorers["clip"].text_features(texts)
    assert found.shape == (len(texts), 8)
    np.testing.assert_allclose(found[-3:], scorers["clip"].text_features(texts[-3:]), rtol=1e-5, atol=1e-5)


def test_a_prefix_stands_before_each_text(files, scorers):
    plain, prefixed = scorers["clip"], text_scores.load_clip(files["clip"], files["words"], prefix="a ")
    np.testing.assert_allclose(prefixed.text_features(["cat"]), plain.text_features(["a cat"]), rtol=1e-6)
    assert np.abs(prefixed.text_features(["cat"]) - plain.text_features(["cat"])).max() > 1e-4
    assert "'a '" in prefixed.recipe
    assert prefixed.weights == plain.weights


def test_antialiasing_is_told_and_matters(files, scorers):
    new, old = scorers["hps"], text_scores.load_hps(files["hps"], files["words"], antialias=False)
    assert ("antialiased" in new.recipe, "antialiased" in old.recipe) == (True, False)
    assert np.abs(new.score(images(), TEXTS) - old.score(images(), TEXTS)).max() > 1e-5


def test_files_that_do_not_fit_are_named(files, tmp_path):
    with pytest.raises(RearError, match=r"clip\.pt is CLIP of width 768 .*HPSv2 is a ViT-H-14: give HPS_v2\.1"):
        text_scores.load_hps(files["clip"], files["words"])
    other = write_vocabulary(tmp_path / "other.txt.gz", ["a t</w>"])
    with pytest.raises(RearError, match=r"other\.txt\.gz has 515 ids, .*clip\.pt wants 516: give CLIP's own"):
        text_scores.load_clip(files["clip"], other)
