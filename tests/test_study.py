"""A study: its table by hand, and a whole one at toy size."""

import json

import pytest
from ml_collections import ConfigDict

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.jobs.study import table
from tests import toy


def test_the_table_has_means_and_deviations():
    rows = {"one_way": [{"FD": 1.0, "reward": -1.0}, {"FD": 3.0, "reward": -1.0}]}
    assert table(rows).splitlines() == ["| variant | FD | reward |", "|---|---|---|", "| one way | 2 ± 1.4 | -1 ± 0 |"]


def test_one_seed_is_no_study(tmp_path):
    with pytest.raises(RearError, match="2 or more"):
        toy.run(tmp_path, "study", study__seeds=(0,))


@pytest.mark.slow
def test_a_study_runs_once_and_leaves_its_table(tmp_path):
    config = toy.config(method__name="ar", posttrain__reward__perceptual=0.0, sample__stage="posttrain")
    config.posttrain.loop.update(steps=2, batch_size=8)
    config.study.update(seeds=(0, 1), last=1)
    frozen = {"posttrain": {"optimizer": {"learning_rate": 0.0, "final_learning_rate": 0.0}}}
    with config.study.unlocked():
        config.study.variants = ConfigDict({"before": frozen, "both": {}})
    for job in ("tokenizer", "tokenize", "study"):
        jobs.JOBS[job](config, tmp_path)
    results = json.loads((tmp_path / "study.json").read_text())["results"]
    assert [len(runs) for runs in results.values()] == [2, 2]
    assert results["before"][0]["scores"] != results["before"][1]["scores"]
    assert (tmp_path / "study.md").read_text().count("\n") == 4
    stamp = (tmp_path / "seed_1" / "both" / "scores.json").stat().st_mtime_ns
    jobs.JOBS["study"](config, tmp_path)
    assert (tmp_path / "seed_1" / "both" / "scores.json").stat().st_mtime_ns == stamp
    assert (tmp_path / "study.png").stat().st_size > 0
