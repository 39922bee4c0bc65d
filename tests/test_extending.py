"""Families from outside the package: a generator and a tokenizer of a few lines, from training to export and plan."""

import json
import pathlib
import shutil

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, jobs, tokenizers
from rear_jax.generators import GeneratorFamily
from rear_jax.generators.cached import CachedGenerator, Weights
from rear_jax.generators.interface import Features
from rear_jax.runtime.sharding import Rule
from rear_jax.tokenizers import TokenizerFamily, vit
from rear_jax.tokenizers.base import CodebookTokenizer
from rear_jax.weights.family import truncate
from rear_jax.weights.layout import Layout, TorchName
from tests import toy

# --- the two families begin here


class Means(nn.Module):
    """Predicts a code from the class and the mean of the codes before it."""

    codebook_size: int
    num_classes: int
    num_codes: int
    width: int = 8
    dtype: type = jnp.float32

    def setup(self):
        self.codes, self.labels = nn.Embed(self.codebook_size, self.width), nn.Embed(self.num_classes + 1, self.width)
        self.head = nn.Dense(self.codebook_size)

    def __call__(self, codes, labels, *, dropout=None):
        before = jnp.cumsum(self.codes(codes), axis=1) - self.codes(codes)  # [B, N, W]
        return Features(self.predict(self.labels(labels)[:, None], before, jnp.arange(self.num_codes)[:, None]))

    def predict(self, label, total, count):
        return self.head(nn.tanh(label + total / jnp.maximum(count, 1)))

    def read(self, cache, codes, count):
        label, total = cache
        total = total + self.codes(codes)
        return self.predict(label, total, count), (label, total)


class CachedMeans(CachedGenerator):
    """Its cache is the class's vector and the sum of the codes' so far."""

    def prepare(self, params):
        return Weights([], params)

    def new_cache(self, batch, length):
        return (jnp.zeros((batch, self.model.width)),) * 2

    def grow_cache(self, cache, length):
        return cache

    def prefill(self, weights, conditions, rows, cache):
        label = weights.rest["labels"]["embedding"][conditions[rows]]
        return self.call(weights, "predict", label, cache[1], 0), (label, cache[1])

    def step(self, weights, conditioning, rows, codes, position, cache):
        return self.call(weights, "read", cache, codes, position)


class Unpatch(nn.Module):
    @nn.compact
    def __call__(self, vectors):
        return vit.pixels_of_patches(nn.Dense(3 * 8 * 8, name="conv_out")(vectors), vectors.shape[1], 8)


class Patches(CodebookTokenizer):
    """A code for each patch of 8 x 8 pixels, by one linear layer on either side."""

    image_size: int
    codebook_size: int = 16
    embedding_dim: int = 4
    l2_normalize: bool = False
    dtype: type = jnp.float32
    latent_shape = property(lambda self: (self.image_size // 8,) * 2)

    def setup(self):
        self.encoder, self.codebook = nn.Conv(self.embedding_dim, (8, 8), 8, "VALID"), self.make_codebook()
        self.decoder = Unpatch()


def layout(prefix):
    return Layout(
        rf"{prefix}\.codes.*|{prefix}\.codebook", lambda path: TorchName(".".join([prefix, *path])), lambda _: {}
    )


RULES = (Rule("kernel$", decays=True), Rule("(bias|embedding|codebook)$"))
MEANS = GeneratorFamily("means", Means, layout("means"), RULES, truncate, dtype="float32", cached=CachedMeans)
PATCHES = TokenizerFamily("patches", Patches, layout("patches"), RULES, truncate)

# --- the two families end here

MSE_ONLY = {"perceptual": 0.0, "mse": 1.0}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(generators.FAMILIES, "means", MEANS)
    monkeypatch.setitem(tokenizers.FAMILIES, "patches", PATCHES)


def config(**changes):
    """The toy experiment with both families."""
    made = toy.config(**{"method__name": "ar", "train__loop__steps": 8, **changes})
    made.posttrain.reward.update(MSE_ONLY)
    made.posttrain.loop.update(steps=2, batch_size=4, picture_every=0)
    with made.unlocked():
        made.tokenizer, made.model = PATCHES.section(), MEANS.section()
    return made


def run(workdir: pathlib.Path, *names: str, **changes) -> None:
    for name in names:
        jobs.JOBS[name].run(config(**changes), workdir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(generators.FAMILIES, "means", MEANS)
        patched.setitem(tokenizers.FAMILIES, "patches", PATCHES)
        run(workdir, "tokenizer", "tokenize", "train", "posttrain", "sample")
    return workdir


def test_both_families_take_eighty_lines():
    lines = pathlib.Path(__file__).read_text().splitlines()
    begin, end = (
        next(n for n, line in enumerate(lines) if line.startswith("# ---") and what in line)
        for what in ("begin", "end")
    )
    assert end - begin - 1 <= 80


def test_a_resumed_run_is_bit_identical(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "generator" / "8")
    run(tmp_path / "cut", "train")
    states = [toy.saved_state(place / "generator") for place in (trained, tmp_path / "cut")]
    assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))


def test_samples_follow_the_labels_and_the_recipe(trained):
    with np.load(trained / "samples.npz") as file:
        assert file["arr_0"].shape == (24, 32, 32, 3)
        assert file["labels"].tolist() == [i % 10 for i in range(24)]
    assert json.loads((trained / "samples.json").read_text())["eight_bit"] == "truncate"


@pytest.mark.slow
def test_cached_decoding_is_the_full_pass():
    network = Means(16, 10, 16)
    params = MEANS.init(network, seed=0)
    codes, labels = np.random.default_rng(0).integers(0, 16, (3, 16)), np.array([1, 4, 10])
    wanted = network.apply({"params": params}, codes, labels).logits
    cached = generators.cached(network)
    weights, rows = cached.prepare(params), np.arange(3)
    logits, cache = cached.prefill(weights, labels, rows, cached.new_cache(3, 1))
    found = [logits]
    for n in range(1, 16):
        logits, cache = cached.step(weights, None, rows, codes[:, n - 1], n, cache)
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, axis=1), wanted, atol=1e-5)


def test_the_posttrained_generator_is_another_one(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run(tmp_path / "copy", "sample", sample__stage="posttrain")
    before, after = (json.loads((place / "samples.json").read_text()) for place in (trained, tmp_path / "copy"))
    assert (before["stage"], after["stage"]) == ("train", "posttrain")
    assert before["generator"] != after["generator"]
    assert before["tokenizer"] == after["tokenizer"]


@pytest.mark.parametrize("part", ["generator", "tokenizer"])
def test_export_and_back(trained, tmp_path, part):
    file = tmp_path / "file.safetensors"
    run(trained, "convert", convert__source=str(trained / part), convert__export=str(file))
    run(tmp_path, "convert", convert__source=str(file), tokenizer_from=str(trained / "tokenizer"))
    run(
        tmp_path,
        "convert",
        convert__source=str(tmp_path / "converted"),
        convert__export=str(tmp_path / "again.safetensors"),
    )
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.slow
def test_plan(trained, tmp_path):
    run(
        tmp_path,
        "plan",
        plan__topology="h100:4",
        plan__programs=("train", "posttrain", "sample"),
        plan__compiles=0,
    )
    programs = json.loads((tmp_path / "plan.json").read_text())["programs"]
    assert all(programs[name]["model_flops"] > 0 for name in ("train", "posttrain", "sample"))
