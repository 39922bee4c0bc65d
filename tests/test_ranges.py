"""Every setting has a range, and a value out of it is one line before anything runs."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rear_jax import config as sections
from rear_jax import jobs
from rear_jax.config import ranges
from rear_jax.errors import RearError
from rear_jax.runtime.identity import flatten
from tests import toy

GENERATORS = ("rar", "llamagen", "janus", "alitok_generator")
TOKENIZERS = ("maskgit_vqgan", "vqgan_plus", "llamagen_vq", "titok", "alitok")
SENSELESS = (0, -1, math.nan, math.inf, -math.inf, 1e30, 10**5000, True, "x", "", None, "a\0b", "~nobody/a", (), [0])


def put(config: ConfigDict, key: str, value: object) -> None:
    """Sets a leaf to anything, as a config file can that goes around the types."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config[parent]
    with config.unlocked(), config.ignore_type():
        config[name] = value


def value_of(config: ConfigDict, key: str) -> object:
    """A leaf, as ConfigDict has stored it."""
    for name in key.split("."):
        config = config[name]
    return config


def every_config() -> list[ConfigDict]:
    """The default experiment with each family."""
    made = []
    for section, names in (("model", GENERATORS), ("tokenizer", TOKENIZERS)):
        for name in names:
            made.append(sections.default())
            with made[-1].unlocked():
                made[-1][section] = getattr(sections, name)()
    return made


def test_every_setting_has_a_range_and_its_default_lies_in_it():
    leaves = set()
    for config in every_config():
        ranges.checked(config)
        leaves |= flatten(config.to_dict()).keys()
    assert leaves == set(ranges.ALLOWED)  # no leaf without a range, no range without a leaf


def refused_or_taken(config: ConfigDict) -> str:
    """What is said of a config, in one line; '' where it is taken."""
    said = ""
    try:
        ranges.checked(config)
    except RearError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 600
    return said


@pytest.mark.parametrize("key", sorted(flatten(toy.config().to_dict())))
def test_a_senseless_value_is_one_line_that_names_the_setting(key):
    for value in SENSELESS:
        config = toy.config()
        try:
            put(config, key, value)
        except OverflowError:  # of ConfigDict itself, which makes floats of integers
            continue
        said = refused_or_taken(config)
        assert said or ranges.ALLOWED[key].fits(value_of(config, key))  # True is 1.0 where a float is
        assert not said or said.startswith((f"config.{key} = ", "config lacks "))


@pytest.mark.parametrize(
    ("key", "values"),
    [  # from public reports, and slips that emptied a folder or filled a memory
        ("sample.num_images", (-3, 10**9)),
        ("sample.classes", ((-1,), ("",), (1.5,), (True,))),
        ("sample.images_per_class", (0,)),
        ("sample.batch_size", (0, 10**9)),
        ("sample.image_size", (-5,)),
        ("sample.temperature", (-1.0, math.nan)),
        ("sample.guidance_scale", (math.nan, math.inf)),
        ("sample.top_p", (-0.5, 0.0, 1.1)),
        ("method.label_drop", (7.0, -0.1, math.nan)),
        ("seed", (-1, 2**32, 2**64, True)),
        ("train.accumulation", (-1,)),
        ("train.evaluate_every", (-1,)),
        ("train.loop.steps", (0, -1)),
        ("train.loop.keep_checkpoints", (0, -1)),
        ("train.loop.keep_every", (-1,)),
        ("posttrain.loop.keep_checkpoints", (0, -1)),
        ("tokenizer_training.loop.keep_checkpoints", (0, -1)),
        ("model.width", (0, -8, 10**9)),
        ("model.heads", (0, -1)),
        ("model.mlp_width", (0,)),
        ("model.dtype", ("float8", "int32", "abc", "")),
        ("tokenizer.dtype", ("float8", "int32", "abc", "")),
        ("tokenizer.codebook_size", (0, -1, 10**9)),
        ("tokenizer.channel_mult", ((), (0, 1), (-1,), (1.5,), ("a",))),
        ("data.image_size", (0, -1)),
        ("codes.num_shards", (0, 10**9)),
        ("codes.batch_size", (0, 10**9)),
        ("sweep.guidance_scale", ((math.nan,), (-1.0,), ("a",))),
        ("study.seeds", ((0, -1), (0, 2**40))),
    ],
)
def test_what_is_refused(key, values):
    for value in values:
        config = toy.config()
        put(config, key, value)
        assert refused_or_taken(config).startswith(f"config.{key} = "), value


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(ranges.ALLOWED)),
    st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none(), st.lists(st.integers())),
)
def test_any_value_of_any_setting_fits_or_does_not(key, value):
    assert ranges.ALLOWED[key].fits(value) in (True, False)


def test_checks_of_a_job_come_after_the_ranges(tmp_path):
    for name in jobs.JOBS:
        with pytest.raises(RearError, match=r"^config.train.loop.keep_checkpoints = 0: give a whole number of 1 to"):
            jobs.run_all((name,), toy.config(train__loop__keep_checkpoints=0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_variants_of_a_study_are_checked_too(tmp_path):
    config = toy.config(data__path="")
    with config.study.variants.unlocked():
        config.study.variants.other = ConfigDict({"method": {"label_drop": 7.0}})
    with pytest.raises(RearError, match=r"^config.study.variants.other: config.method.label_drop = 7.0: give"):
        jobs.check_all(("study",), config, tmp_path)


def test_paths_expand_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = [key for key in flatten(toy.config().to_dict()) if ranges.ALLOWED[key].path]
    config = toy.config()
    for key in keys:
        put(config, key, "~/a b")
    found = flatten(ranges.checked(config).to_dict())
    assert {found[key] for key in keys} == {f"{tmp_path}/a b"}
    assert config.init_from == "~/a b"  # the config that was given stays as it is
    assert {"tokenizer_from", "init_from", "data.path", "evaluate.reference", "sample.prompts"} <= set(keys)


@pytest.mark.parametrize("path", ["~nobody_at_all/a", "a\0b", "a" * 256, "é" * 128, "/".join(["a" * 200] * 21)])
def test_paths_that_no_file_system_has(path):
    assert refused_or_taken(toy.config(init_from=path)).startswith("config.init_from = ")


def test_a_config_of_something_else():
    assert refused_or_taken(ConfigDict({"a": 1})).startswith("config lacks ")
    config = toy.config()
    with config.unlocked():
        config.sample.temperatur = 1.0
    assert "'sample.temperatur'. Did you mean 'sample.temperature'?" in refused_or_taken(config)


def test_a_setting_of_ones_own_family_or_reward_is_a_finite_number():
    config = toy.config()
    with config.unlocked():
        config.model.cells = 3
        config.posttrain.reward.contrast = 0.1
    assert refused_or_taken(config) == ""
    config.model.cells = 10**31
    assert refused_or_taken(config).startswith("config.model.cells = ")
