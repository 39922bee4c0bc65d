"""`rear_jax.load`: what it opens, that it draws what `--job=sample` draws, and what it refuses."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import rear_jax
from rear_jax import generators, tokenizers
from rear_jax.config import files
from rear_jax.errors import RearError
from rear_jax.weights import safetensors_file
from tests import toy


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Files of a toy tokenizer and a toy generator with random weights."""
    folder, random = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    networks = {"tokenizer": (toy.tokenizer, tokenizers), "generator": (toy.generator, generators)}
    for name, (build, package) in networks.items():
        family = package.family_of(build(toy.config()))
        shapes = family.shapes(build(toy.config()))
        params = jax.tree.map(lambda leaf: 0.3 * random.standard_normal(leaf.shape).astype(np.float32), shapes)
        safetensors_file.save(folder / f"{name}.safetensors", params, family.layout.torch_name)
    return {name: folder / f"{name}.safetensors" for name in networks}


@pytest.fixture(scope="module")
def model(published):
    """Both, opened by the path of the config."""
    return rear_jax.load(toy.CONFIG, **published)


def test_it_draws_what_the_job_draws(model, published, tmp_path):
    changes = {"tokenizer_from": str(published["tokenizer"]), "init_from": str(published["generator"])}
    toy.run(tmp_path, "sample", **changes, sample__classes=("bag", 3), sample__images_per_class=2)
    with np.load(tmp_path / "samples.npz") as file:
        drawn, labels = file["arr_0"], file["labels"]
    images = model.sample(["Bag", 3], num=2)
    assert images.dtype == np.uint8
    assert labels.tolist() == [8, 8, 3, 3]
    assert np.abs(images.astype(int) - drawn).max() <= 1
    assert model.class_names[8] == "Bag"


def test_seeds_and_settings_decide(model):
    once = model.sample(["bag", 3], num=2)
    assert len(np.unique(once.reshape(4, -1), axis=0)) == 4
    apart = np.abs(model.sample((8, 3), num=2, batch_size=2).astype(int) - once)
    assert apart.max() <= 1
    assert (model.sample((8, 3), num=2, seed=1) != once).any()
    greedy = model.sample((8, 8), num=2, temperature=0.0)
    np.testing.assert_array_equal(greedy, greedy[[1, 2, 3, 0]])


def test_a_program_is_compiled_once_for_each_shape(published):
    model = rear_jax.load(toy.config(), **published)
    for seed in (0, 1):
        model.sample(np.array([1, 2]), num=2, seed=seed)
        model.decode(model.encode(np.zeros((3, 32, 32, 3), np.uint8)))
    (program,) = model._programs.values()
    assert (program._cache_size(), model._encode._cache_size(), model._decode._cache_size()) == (1, 1, 1)


def test_codes_and_images_are_those_of_the_tokenizer(model):
    images = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    codes = model.encode(images)
    assert (codes.shape, codes.dtype) == ((3, 16), np.int32)
    np.testing.assert_array_equal(model.encode(images / 255.0), codes)
    module, params = model.tokenizer.module, model.tokenizer.params

    @jax.jit
    def plain(params, pixels):
        codes = module.apply({"params": params}, pixels, method="encode")
        return codes, module.apply({"params": params}, codes, method="decode")

    wanted, decoded = plain(params, images.astype(np.float32) / 255)
    np.testing.assert_array_equal(codes, wanted)
    again = model.decode(codes)
    assert (again.shape, again.dtype) == ((3, 32, 32, 3), np.uint8)
    assert np.abs(again.astype(int) - np.floor(255 * np.asarray(decoded).clip(0, 1))).max() <= 1


def test_a_workdir_is_opened(trained):
    model = rear_jax.load(toy.config(), workdir=trained)
    assert model.generator.step == 12
    with np.load(trained / "samples.npz") as file:
        drawn = file["arr_0"]
    assert np.abs(model.sample(range(10), num=1).astype(int) - drawn[:10]).max() <= 1


def test_a_tokenizer_alone(published):
    model = rear_jax.load(toy.config(), tokenizer=published["tokenizer"])
    assert model.encode(np.zeros((3, 32, 32, 3), np.float32)).shape == (3, 16)
    with pytest.raises(RearError, match="there is no generator to sample from"):
        model.sample(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.sample(10), "classes: there is no class 10: give 0 to 9"),
        (lambda model: model.sample("boot"), "classes: no class is called 'boot'. The nearest: 'Ankle boot' (9)"),
        (lambda model: model.sample([]), "sample takes classes, by number or name, or prompts; it got []."),
        (lambda model: model.sample([2.5]), "sample takes classes, by number or name, or prompts; it got [2.5]."),
        (lambda model: model.sample(0, top_p=0.0), "config.sample.top_p = 0.0: give a number of 0 to 1, not 0."),
        (lambda model: model.sample(0, num=0), "config.sample.images_per_class = 0: give a whole number"),
        (lambda model: model.sample(0, seed=-1), "config.seed = -1: give a whole number"),
        (lambda model: model.encode(np.zeros((2, 16, 16, 3))), "images of shape (2, 16, 16, 3): this tokenizer takes"),
        (lambda model: model.encode(np.full((1, 32, 32, 3), 2.0)), "images are float64: give uint8, or floats from 0"),
        (lambda model: model.decode(np.zeros((2, 15), int)), "codes are int64 (2, 15): this tokenizer takes integers"),
        (lambda model: model.decode(np.full((1, 16), 16)), "codes go from 16 to 16: give 0 to 15."),
        (lambda _: rear_jax.load(toy.config()), "rear_jax.load: name a tokenizer, or the workdir that has one."),
        (
            lambda _: rear_jax.load("rear_m"),
            "--config=rear_m does not exist, and no config has this name. Did you mean rear_",
        ),
        (lambda _: rear_jax.load(toy.config(), tokenizer="no.bin"), "no.bin does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(model, call, message):
    with pytest.raises(RearError) as refused:
        call(model)
    assert str(refused.value).startswith(message)


def test_configs_have_names(tmp_path, monkeypatch):
    expected = toy.ROOT / "configs" / "rear_l.py"
    assert files.find("rear_l") == files.find("rear_l.py") == files.find(str(expected)) == expected
    assert files.load("rear_l").model.width == 1024
    assert files.load("tokenizer_titok_b64:2").tokenizer_training.trained == "decoder"
    (tmp_path / "rear_l.py").write_text("def other(): pass\n")
    (tmp_path / "seven.py").write_text("def get_config(): return 7\n")
    (tmp_path / "text.md").write_text("")
    monkeypatch.chdir(tmp_path)
    assert files.find("rear_l") == expected  # a name is no path
    for name, message in (
        ("./rear_l.py", "rear_l.py has no function get_config"),
        ("seven.py", "returns a int"),
        ("text.md", "is no Python file"),
        ("nowhere/rear_l.py", "--config=nowhere/rear_l.py does not exist, .* Did you mean rear_l"),
    ):
        with pytest.raises(RearError, match=message):
            files.load(name)


def test_importing_the_package_imports_nothing_else():
    script = (
        "import sys, rear_jax; assert 'jax' not in sys.modules and 'ml_collections' not in sys.modules; "
        "from rear_jax import losses; assert 'flax' not in sys.modules and 'rear_jax.pipeline' not in sys.modules; "
        "assert rear_jax.load.__module__ == 'rear_jax.pipeline'"
    )
    subprocess.run([sys.executable, "-c", script], env=toy.environment(), check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        rear_jax.lod  # noqa: B018
