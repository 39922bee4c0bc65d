"""A guidance sweep: which points, what stands in its table, its recipe and its plot."""

import json
import shutil

import pytest

from rear_jax.errors import RearError
from rear_jax.evaluation import report
from rear_jax.jobs import evaluate, sweep
from tests import toy

ADM = ("FID", "sFID", "IS", "precision", "recall", "KID")


@pytest.mark.parametrize(
    ("scores", "drawn"),
    [
        (ADM, ["FID", "IS"]),
        (("FID", "IS"), ["FID", "IS"]),  # a reference of statistics alone
        (("FD-EffNetLite2@224", "precision", "recall", "class_accuracy"), ["FD-EffNetLite2@224", "precision"]),
    ],
)
def test_the_distance_and_the_inception_score_are_drawn(scores, drawn):
    assert sweep.drawn_scores([{"guidance_scale": 1.0, "guidance_power": 1.0} | dict.fromkeys(scores, 0.0)]) == drawn


def test_what_recipes_agree_on():
    recipes = [
        {"weights": "a", "file": name, "reasons": ["few"], "samples": {"scale": scale, "seed": 0}}
        for name, scale in (("x", 1.0), ("y", 2.0), ("x", 1.0))
    ]
    assert report.common(recipes) == {"weights": "a", "reasons": ["few"], "samples": {"seed": 0}}
    assert report.common([{"samples": "unknown"}, {"samples": {"seed": 0}}]) == {}


@pytest.fixture
def points(monkeypatch):
    """The guidance of every point that is sampled; none is really, and its scores are made up."""
    asked = []

    def score(config, workdir, place):
        scale, power = config.sample.guidance_scale, config.sample.guidance_power
        asked.append((scale, power))
        recipe = {"weights": "f00", "samples": {"guidance_scale": scale, "guidance_power": power, "seed": 0}}
        scores = {evaluate.SAMPLES: dict.fromkeys(ADM, 1.0) | {"FID": abs(scale - 2) + power}}
        (place / "scores.json").write_text(json.dumps({"scores": scores, "recipe": recipe}))

    monkeypatch.setattr(sweep.sample, "run", lambda config, workdir, place: None)
    monkeypatch.setattr(sweep.evaluate, "run", score)
    return asked


def test_scales_and_powers_are_combined(points, tmp_path):
    toy.run(tmp_path, "sweep", sweep__guidance_scale=(1.5, 2.0), sweep__guidance_power=(0.5, 2.75))
    assert points == [(1.5, 0.5), (1.5, 2.75), (2.0, 0.5), (2.0, 2.75)]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["guidance_scale"], row["guidance_power"]) for row in written["points"]] == points
    assert written["recipe"] == {"weights": "f00", "samples": {"seed": 0}}
    table = (tmp_path / "sweep.md").read_text()
    assert "| 2 | 0.5 | **0.5** |" in table
    assert "- samples: seed: 0\n" in table


def test_the_best_point_is_confirmed_by_other_samples(points, tmp_path, monkeypatch):
    seeds, score = [], sweep.evaluate.run

    def watched(config, workdir, place):
        seeds.append((place.name, config.sample.guidance_scale, config.seed))
        score(config, workdir, place)

    monkeypatch.setattr(sweep.evaluate, "run", watched)
    toy.run(tmp_path, "sweep", sweep__guidance_scale=(1.0, 2.0, 3.0), sweep__confirm=True)
    assert seeds[:3] == [("1_1", 1.0, 0), ("2_1", 2.0, 0), ("3_1", 3.0, 0)]
    ((name, scale, seed),) = seeds[3:]
    assert (name, scale) == ("best", 2.0)
    assert seed != 0
    confirmed = json.loads((tmp_path / "sweep.json").read_text())["confirmed"]
    assert (confirmed["guidance_scale"], confirmed["FID"]) == (2.0, 1.0)
    assert "again, with new samples:" in (tmp_path / "sweep.md").read_text()


def test_powers_alone_are_swept_at_the_scale_of_the_samples(points, tmp_path):
    toy.run(tmp_path, "sweep", sweep__guidance_power=(0.5, 2.75))
    assert points == [(2.0, 0.5), (2.0, 2.75)]
    with pytest.raises(RearError, match="a sweep needs points"):
        toy.run(tmp_path, "sweep")


@pytest.mark.slow
def test_several_values_where_one_belongs_are_told_of_the_sweep(tmp_path):
    finished = toy.finish(tmp_path, "--job=sweep", "--config.sample.guidance_power=[1,2]")
    assert finished.returncode == 1
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: flag --config.sample.guidance_power=[1,2]: could not convert string to float")
    assert line.endswith("several are for --job=sweep: --config.sweep.guidance_power='(1.5, 2.0)'")


@pytest.mark.slow
def test_each_point_is_drawn_and_scored_once(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    # a scale at which even a generator that has hardly learned heeds its classes
    grid = {"sweep__guidance_scale": (1e4,), "sweep__guidance_power": (0.0, 1.0), "sample__num_images": 10}
    toy.run(tmp_path, "sweep", **grid)
    written = json.loads((tmp_path / "sweep.json").read_text())
    constant, rising = (row["FD-EffNetLite2@32"] for row in written["points"])
    assert constant != rising
    assert (tmp_path / "sweep.md").read_text().count("**") == 2
    assert {"generator", "generator_dtype", "seed", "drawn_with"} <= written["recipe"]["samples"].keys()
    assert (tmp_path / "sweep.png").stat().st_size > 0
    stamp = (tmp_path / "sweep" / "10000_0" / "samples.npz").stat().st_mtime_ns
    toy.run(tmp_path, "sweep", **grid)
    assert (tmp_path / "sweep" / "10000_0" / "samples.npz").stat().st_mtime_ns == stamp
