"""A study: its table by hand, and a whole one at toy size."""

import json

import pytest
from ml_collections import ConfigDict

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.evaluation import curves
from rear_jax.jobs import study as study_job
from rear_jax.jobs.study import table
from tests import toy
from tests.test_configs import load


def compared(rows: dict[str, list[dict[str, float]]]) -> str:
    """The table in which all rows are compared with the first."""
    return table(rows, dict.fromkeys(rows, next(iter(rows))))


def test_the_table_has_means_and_deviations():
    rows = {"one_way": [{"FD": 1.0, "reward": -1.0}, {"FD": 3.0, "reward": -1.0}]}
    assert compared(rows).splitlines() == [
        "| variant | FD | reward |",
        "|---|---|---|",
        "| one way | 2 ± 1.4 | -1 ± 0 |",
    ]


def test_a_large_deviation_is_written_in_full():
    assert compared({"few_steps": [{"FD": 460.0}, {"FD": 640.0}]}).splitlines()[-1] == "| few steps | 550 ± 130 |"


def test_the_table_marks_what_differs_from_the_first_row_beyond_chance():
    """Welch's t-test by hand: t = 3.1 with 2.9 degrees of freedom has p = 0.055, t = 7.3 with 4 has p = 0.002."""
    rows = {
        "plain": [{"FD": value} for value in (10.0, 11.0, 12.0)],
        "near": [{"FD": value} for value in (9.0, 9.5, 8.5)],
        "far": [{"FD": value} for value in (5.0, 4.0, 6.0)],
        "other": [{"FD": value, "noise": 0.5} for value in (10.0, 11.0, 12.5)],
    }
    _, _, plain, near, far, other = compared(rows).splitlines()
    assert plain == "| plain | 11 ± 1 |  |"
    assert near == "| near | 9 ± 0.5 |  |"
    assert far == "| far | 5 ± 1 \\* |  |"
    assert other == "| other | 11.17 ± 1.3 | 0.5 ± 0 |"


@pytest.mark.parametrize(
    ("variants", "references"),
    [
        ({"a": {"seed": 1}, "b": {"seed": 2}, "c": {}}, ["a", "a", "a"]),
        ({"a_1": {"model": {"width": 1}}, "a_2": {"model": {"width": 2}}}, ["a_1", "a_1"]),
        (
            {
                "a_1": {"model": {"width": 1}, "method": {"name": "ar"}},
                "a_2": {"model": {"width": 2}, "method": {"name": "ar"}},
                "b_1": {"model": {"width": 1}},
                "b_2": {"model": {"width": 2}},
            },
            ["a_1", "a_2", "a_1", "a_2"],
        ),
    ],
    ids=["one network", "networks alone", "networks and methods"],
)
def test_a_variant_is_compared_with_the_first_of_its_network(variants, references):
    found = study_job._references(variants)
    assert found == dict(zip(variants, references, strict=True))
    results = {name: [{"Samples": {"FD": float(place)}}] * 2 for place, name in enumerate(variants)}
    *rows, note = study_job._page(results, found).splitlines()
    marked = [row.split("|")[1].strip().replace(" ", "_") for row in rows if "*" in row]
    assert marked == [name for name, reference in found.items() if name != reference]
    assert all(repr(name.replace("_", " ")) in note for name in set(references))


def test_equal_runs_differ_where_their_values_do():
    rows = {"a": [{"x": 1.0}] * 2, "b": [{"x": 2.0}] * 2, "c": [{"x": 1.0}] * 2}
    assert [line.count("*") for line in compared(rows).splitlines()[2:]] == [0, 1, 0]


def test_one_seed_is_no_study(tmp_path):
    with pytest.raises(RearError, match="2 or more"):
        toy.run(tmp_path, "study", study__seeds=(0,))


def study(variants, **changes):
    """The toy experiment as a study of two seeds."""
    config = toy.config(method__name="ar", posttrain__reward__perceptual=0.0, sample__stage="posttrain", **changes)
    config.posttrain.loop.update(steps=2, batch_size=8)
    config.study.update(seeds=(0, 1), last=1)
    with config.study.unlocked():
        config.study.variants = ConfigDict(variants)
    return config


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (
            {"both": {}, "typo": {"posttrain": {"prior_wieght": 0.0}}},
            "no .*'posttrain.prior_wieght'. Did .*prior_weight'",
        ),
        ({"typo": {"posttrain": {"prior_weight": "none"}}}, "typo: .*none is of original type"),
        ({"typo": {"posttrain": 3.0}}, "typo: config has no setting 'posttrain'"),
    ],
)
def test_a_variant_that_does_not_fit_is_named_before_anything_runs(tmp_path, variants, message):
    with pytest.raises(RearError, match=message) as caught:
        jobs.JOBS["study"].run(study(variants), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_job_is_named_before_anything_runs(tmp_path):
    with pytest.raises(RearError, match="unknown job 'score'"):
        jobs.JOBS["study"].run(study({"both": {}}, study__variant_jobs=("posttrain", "score")), tmp_path)


def test_the_va_pi_study_watches_all_variants_over_the_same_images():
    config = load(toy.ROOT / "configs" / "study_va_pi.py")
    assert not any("loop" in changes.get("posttrain", {}) for changes in config.study.variants.values())
    assert config.posttrain.loop.steps // config.posttrain.loop.log_every >= config.study.last
    assert 0.0 < config.posttrain.kl_weight < 1e-4
    assert config.sweep.guidance_scale == (1.0, config.sample.guidance_scale)


@pytest.mark.parametrize("name", ["parts", "long", "prior", "noise", "after_ar"])
def test_every_study_of_va_pi_begins_with_the_generator_as_it_was(name):
    config = load(toy.ROOT / "configs" / "study_va_pi.py", name)
    first, *others = config.study.variants.items()
    assert first[1].posttrain.optimizer.learning_rate == 0.0
    assert others
    assert config.posttrain.loop.steps == (400 if name in ("long", "after_ar") else 64)
    assert config.train.loop.steps == (280 if name == "parts" else 2000)
    assert config.method.name == ("ar" if name == "after_ar" else "rear")


@pytest.mark.parametrize(("name", "count"), [("few", 7), ("all", 2)])
def test_the_rear_studies_change_the_objective_alone(name, count):
    config = load(toy.ROOT / "configs" / "study_rear.py", name)
    assert all(list(changes) == ["method"] for changes in config.study.variants.values())
    assert config.sweep.confirm
    assert len(set(map(str, config.study.variants.values()))) == len(config.study.variants) == count


def test_both_rear_studies_see_each_image_as_often():
    images = {"few": 1200, "all": 12_000}
    configs = {name: load(toy.ROOT / "configs" / "study_rear.py", name) for name in images}
    assert [config.train.num_images for config in configs.values()] == [1200, 0]
    epochs = {config.train.loop.steps * config.train.loop.batch_size / images[name] for name, config in configs.items()}
    assert len(epochs) == 1


def test_the_freedoom_study_changes_the_objective_alone():
    config = load(toy.ROOT / "configs" / "study_freedoom.py")
    assert {name: list(changes) for name, changes in config.study.variants.items()} == {"ar": ["method"], "rear": []}
    assert config.sweep.confirm
    assert config.train.num_images % config.data.num_classes == 0


@pytest.mark.parametrize("size", ["small", "imagenet"])
def test_the_scaling_study_changes_network_and_objective(size):
    """The paper's networks are those of their own files; each is trained by both methods, the smallest first."""
    config = load(toy.ROOT / "configs" / "study_scaling.py", size)
    widths = [changes.model.width for changes in config.study.variants.values()]
    assert len(widths) == 6
    assert all(set(changes) <= {"model", "method"} for changes in config.study.variants.values())
    assert config.train.loop.steps % config.train.evaluate_every == 0
    assert config.model.width == max(widths)  # what --job=plan plans
    if size == "imagenet":
        _, variants = study_job._plan(config, toy.ROOT, 0)
        for letter, name in zip("sbl", ("20x768", "24x768", "24x1024"), strict=True):
            for method in ("ar", "rear"):
                own = load(toy.ROOT / "configs" / f"{method}_{letter}.py")
                variant = variants[f"{method}_{name}"]
                assert (variant.model.to_dict(), variant.method.name) == (own.model.to_dict(), own.method.name)
                assert variant.train.loop.to_dict() == own.train.loop.to_dict()
                assert variant.train.optimizer.to_dict() == own.train.optimizer.to_dict()


def test_the_scaling_study_on_imagenet_can_be_planned(tmp_path):
    config = load(toy.ROOT / "configs" / "study_scaling.py", "imagenet")
    config.plan.topology = "a100:8"
    jobs.JOBS["plan"].check(config, tmp_path, ())
    config.plan.topology = "a100:7"
    with pytest.raises(RearError, match="choose a multiple of 7"):
        jobs.JOBS["plan"].check(config, tmp_path, ())


def test_the_scaling_study_names_its_sizes():
    with pytest.raises(RearError, match=r"there is no size 'large': .* :small, :imagenet"):
        load(toy.ROOT / "configs" / "study_scaling.py", "large")


def test_variants_stand_in_the_order_of_their_numbers():
    names = ["rear_24x768", "ar_24x1024", "ar_20x768", "ar", "ar_24x768", "3x64", "3x128"]
    ordered = ["3x64", "3x128", "ar", "ar_20x768", "ar_24x768", "ar_24x1024", "rear_24x768"]
    assert study_job._in_order(names) == ordered


def test_a_network_has_a_colour_and_an_objective_a_style():
    ar, small, large = {"method": {"name": "ar"}}, {"model": {"width": 64}}, {"model": {"width": 128}}
    looks = curves.styles({"ar_64": ar | small, "rear_64": small, "ar_128": ar | large, "rear_128": large})
    assert [look["linestyle"] for look in looks.values()] == ["--", "-", "--", "-"]
    assert [look["color"] for look in looks.values()] == ["C0", "C0", "C1", "C1"]


def test_on_one_network_each_objective_has_a_colour():
    looks = curves.styles({"ar": {"method": {"name": "ar"}}, "rear": {}})
    assert looks == {"ar": {"color": "C0"}, "rear": {"color": "C1"}}


@pytest.mark.slow
def test_a_study_runs_once_and_leaves_its_tables(tmp_path):
    frozen = {"posttrain": {"optimizer": {"learning_rate": 0.0, "final_learning_rate": 0.0}}}
    variants = {"before": frozen, "both": {}}
    sweep = {"study__variant_jobs": ("posttrain", "sweep"), "sweep__guidance_scale": (1.0, 2.0)}
    config = study(variants, posttrain__kl_weight=1e-6, **sweep)
    for job in ("tokenizer", "tokenize", "study"):
        jobs.JOBS[job].run(config, tmp_path)
    results = json.loads((tmp_path / "study.json").read_text())["results"]
    assert [len(runs) for runs in results.values()] == [2, 2]
    first, second = results["before"]
    *sampled, trained = first
    assert sampled == ["Samples without guidance", "Samples at guidance 2, power 1"]
    assert all(first[title] != second[title] for title in sampled)
    assert trained.startswith("Training, means of the last")
    assert {"kl", "ratio", "clip_share", "entropy"} <= first[trained].keys()
    assert first[trained]["kl"] == 0.0
    page = (tmp_path / "study.md").read_text()
    assert page.count("| before |") == page.count("| both |") == 3
    score = tmp_path / "seed_1" / "both" / "sweep" / "1_1" / "scores.json"
    stamp = score.stat().st_mtime_ns
    jobs.JOBS["study"].run(config, tmp_path)
    assert score.stat().st_mtime_ns == stamp
    assert (tmp_path / "study.png").stat().st_size > 0

    config.study.variants.before.posttrain.optimizer.learning_rate = 1e-3
    with pytest.raises(RearError, match=r"before belongs to another config: posttrain\.optimizer\.learning_rate \(was"):
        jobs.JOBS["study"].run(config, tmp_path)

    plain = study({"both": {}}, posttrain__kl_weight=1e-6)  # one set of samples; the training is done
    jobs.JOBS["study"].run(plain, tmp_path)
    assert "## Samples\n" in (tmp_path / "study.md").read_text()


@pytest.mark.slow
def test_objectives_are_variants_too(tmp_path):
    """Each variant trains from nothing; a metric that only one of them has leaves the other's cell empty."""
    config = toy.config(
        study__jobs=(),
        study__variant_jobs=("train", "sweep", "analyze"),
        sweep__guidance_scale=(1.0, 2.0),
        sweep__confirm=True,
        analyze__diagnostics=("accuracy",),
        analyze__num_images=8,
        analyze__batch_size=8,
        analyze__noise_shares=(0.0, 0.1),
        evaluate__reconstructed_reference=True,
        train__evaluate_every=2,
        train__evaluate_images=8,
    )
    config.study.update(seeds=(0, 1), last=1)
    with config.study.unlocked():
        config.study.variants = ConfigDict({"ar": {"method": {"name": "ar"}}, "rear": {"method": {"name": "rear"}}})
    for job in ("tokenizer", "tokenize"):
        jobs.JOBS[job].run(config, tmp_path)
    jobs.JOBS["study"].check(config, tmp_path, ())
    jobs.JOBS["study"].run(config, tmp_path)

    results = json.loads((tmp_path / "study.json").read_text())["results"]
    titles = list(results["ar"][0])
    assert titles[:3] == [
        "Samples without guidance",
        "Samples at guidance 2, power 1",
        "New samples at the best guidance of each run",
    ]
    assert titles[3:5] == ["Predictions: CTR", "Predictions: perplexity"]
    assert list(results["rear"][1]["Predictions: CTR"]) == [
        f"{images}, {noise} of context random" for images in ("train", "held-out") for noise in ("0%", "10%")
    ]
    first, second = (run["Samples without guidance"] for run in results["ar"])
    assert first != second
    page = (tmp_path / "study.md").read_text()
    assert "| shallow |" in page
    assert page.count("| ar |") == page.count("| rear |") == len(titles)
    assert (tmp_path / "study.png").stat().st_size > 0
    assert (tmp_path / "study_distances.png").stat().st_size > 0
    for watched in ("FD-EffNetLite2@32", "FD-EffNetLite2@32 from reconstructions"):
        assert list(results["ar"][0][f"Samples in training: {watched}"]) == [f"step {n}" for n in range(2, 13, 2)]
    for seed in config.study.seeds:
        assert not (tmp_path / f"seed_{seed}" / "generator").exists()
