"""Scores while a generator is being trained: what is refused before the first step, and what is left behind."""

import json

import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.evaluation import watching
from rear_jax.evaluation.watching import Watch
from rear_jax.metrics.features import FeatureExtractor, Network
from tests import toy
from tests.test_evaluation import statistics
from tests.test_scores import colours, pictures


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample__batch_size": 8}, r"config\.sample\.batch_size = 8 does not divide .* on 3 device\(s\)"),
        ({"sample__use_ema": True}, r"config\.sample\.use_ema: train with config\.train\.ema_decay"),
        ({"sample__image_size": 24}, r"24x24 pixels do not compare with adm\.npz: 40 images of 32"),
        ({"train__evaluate_images": 9}, "IS needs 10 images or more; there are 9,"),
        ({"evaluate__kid_subset_size": 31}, "KID needs 31 images or more; there are 30,"),
        ({"evaluate__num_compared": 2}, "precision needs 4 images or more; .* 2 of the reference"),
    ],
)
def test_refusals_before_the_first_step(tmp_path, monkeypatch, changes, message):
    blind = FeatureExtractor(**vars(colours()) | {"apply": None})  # no image gets as far as to the network
    monkeypatch.setattr(watching, "load_network", lambda settings: Network(blind, "weights"))
    monkeypatch.setattr("jax.device_count", lambda: 3)
    np.savez(tmp_path / "adm.npz", arr_0=pictures(1, size=32), **statistics())
    given = {"evaluate__network": "inception", "evaluate__reference": str(tmp_path / "adm.npz")}
    given |= {"evaluate__kid_subset_size": 10, "sample__batch_size": 6, "train__evaluate_images": 30}
    with pytest.raises(RearError, match=message) as caught:
        Watch(toy.config(**given | changes), tmp_path, None, None, {})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_training_scores_itself_and_keeps_its_best(trained, tmp_path):
    """The best generator can be sampled from, and its scores stand in the metrics of a job of their own."""
    given = {"tokenizer_from": str(trained / "tokenizer"), "codes_from": str(trained / "codes")}
    watched = {"train__evaluate_every": 2, "train__evaluate_images": 12, "evaluate__kid_subset_size": 0}
    toy.run(tmp_path, "train", **given, **watched, train__loop__steps=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["FD-EffNetLite2@32"] for line in lines if line["job"] == "train_scores"}
    assert sorted(found) == [2, 4]
    recipe = json.loads((tmp_path / "train_scores.json").read_text())
    assert (recipe["samples"]["num_images"], recipe["samples"]["seed"]) == (12, 0)
    assert {"weights", "reference", "reference_fingerprint"} <= recipe.keys()
    assert {"jaxlib", "platform"} <= recipe["drawn_with"].keys()
    assert not recipe["comparable_with_published_FID"]
    best = min(found, key=found.get)
    assert [p.name for p in (tmp_path / "generator_best").iterdir() if p.name.isdigit()] == [str(best)]
    toy.run(tmp_path, "sample", **given, sample__stage="best")
    assert json.loads((tmp_path / "samples.json").read_text())["generator_step"] == best
