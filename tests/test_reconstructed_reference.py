"""The distance of samples from reconstructions: what a generator loses beyond its tokenizer."""

import json

import numpy as np
import pytest

from rear_jax import artifacts
from rear_jax.errors import RearError
from rear_jax.evaluation.reconstructions import ReconstructedImages
from rear_jax.evaluation.reference import RealImages
from rear_jax.jobs import evaluate
from rear_jax.metrics import scores
from tests import toy
from tests.test_evaluation import NETWORK

COLUMN = f"{scores.distance_name(NETWORK.extractor)} from reconstructions"
CHANGES = {"evaluate__reconstructed_reference": True, "evaluate__tokenizer": False, "evaluate__kid_subset_size": 0}


@pytest.fixture
def config(trained, monkeypatch):
    """The toy experiment on the trained tokenizer, with colours in the place of Inception's features."""
    monkeypatch.setattr(evaluate, "load_network", lambda settings: NETWORK)
    return toy.config(tokenizer_from=str(trained / "tokenizer"), **CHANGES)


def distances(config, place, images) -> dict[str, float]:
    """The scores of images [n, H, W, 3]."""
    place.mkdir()
    np.savez(place / "samples.npz", arr_0=images)
    evaluate.run(config, place)
    return json.loads((place / "scores.json").read_text())["scores"][evaluate.SAMPLES]


def test_reconstructions_have_none_and_the_originals_have(config, tmp_path):
    config.evaluate.cache = str(tmp_path / "references")
    tokenizer = artifacts.load_tokenizer(config, tmp_path)
    count = config.evaluate.num_reference
    originals = RealImages(config.data, config.data.eval_split, count)
    after = ReconstructedImages(config.data, config.data.eval_split, count, tokenizer)
    of_after = distances(config, tmp_path / "after", np.concatenate(list(after.batches(20, []))))
    of_originals = distances(config, tmp_path / "originals", np.concatenate(list(originals.batches(20, []))))
    assert of_after[COLUMN] == pytest.approx(0.0, abs=1e-6)
    assert of_originals[COLUMN] > 0.01
    assert next(iter(of_after)) != COLUMN  # which sweeps look at
    assert len(list((tmp_path / "references").iterdir())) == 2  # kept, and taken again


def test_samples_of_another_size_are_refused(config, tmp_path):
    with pytest.raises(RearError, match="Images of 16x16 pixels do not compare with"):
        distances(config, tmp_path / "small", np.zeros((24, 16, 16, 3), np.uint8))
