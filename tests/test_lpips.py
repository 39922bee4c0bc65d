"""LPIPS: what a distance must be, its files with everything that can be wrong with them, and the jobs that use it."""

import functools
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import config as configs
from rear_jax.errors import RearError
from rear_jax.evaluation import reference
from rear_jax.jobs import evaluate
from rear_jax.metrics import lpips, perceptual
from rear_jax.metrics.features import Network
from rear_jax.metrics.lpips import LPIPS, perceptual_distance
from rear_jax.runtime.identity import fingerprint
from rear_jax.weights.layout import to_torch
from tests import toy
from tests.golden_checks.lpips_vgg16 import weights
from tests.test_scores import colours

NETWORK = LPIPS()


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return weights(0)


@functools.cache
def params():
    return lpips.params_from(tensors())


@functools.cache
def images() -> jax.Array:
    """Four pictures [4, 16, 16, 3] in [0, 1], one of them black."""
    return jax.random.uniform(jax.random.key(0), (4, 16, 16, 3)).at[3].set(0.0)


@jax.jit
def distance(params, a, b):
    return NETWORK.apply({"params": params}, a, b)


@jax.jit
def gradient(params, a, b):
    return jax.grad(lambda a: NETWORK.apply({"params": params}, a, b).sum())(a)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """The two files as they are published: VGG16 with its classifier, and the heads."""
    folder = tmp_path_factory.mktemp("lpips")
    vgg16 = {key: value for key, value in tensors().items() if key.startswith("features.")}
    save_file(vgg16 | {"classifier.0.weight": np.zeros((2, 2), np.float32)}, folder / "vgg16.safetensors")
    save_file({k: v for k, v in tensors().items() if k.startswith("lin")}, folder / "heads.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("vgg16", "heads")}


@pytest.mark.slow
def test_symmetric_positive_and_each_pair_by_itself():
    a, b = images(), images()[::-1]
    there, back = distance(params(), a, b), distance(params(), b, a)
    assert there.shape == (4,)
    assert there.dtype == jnp.float32
    np.testing.assert_allclose(there, back, rtol=1e-6)
    assert (there > 1e-3).all()
    np.testing.assert_allclose(distance(params(), a[1:2], b[1:2])[0], there[1], rtol=1e-5)


@pytest.mark.slow
def test_equal_images_are_at_zero_with_zero_gradient():
    np.testing.assert_allclose(distance(params(), images(), images()), 0.0, atol=1e-12)
    np.testing.assert_allclose(gradient(params(), images(), images()), 0.0, atol=1e-8)


@pytest.mark.slow
def test_gradient_is_finite_and_is_that_of_the_distance():
    a, b = images(), images()[::-1]
    slope = gradient(params(), a, b)
    assert np.isfinite(slope).all()
    step = (1e-3 * slope / jnp.linalg.norm(slope)).at[3].set(0.0)  # the black image lies on the pools' kinks
    change = (distance(params(), a + step, b) - distance(params(), a - step, b)).sum() / 2
    np.testing.assert_allclose(change, jnp.sum(slope * step), rtol=0.01)


@pytest.mark.slow
def test_gradient_is_finite_where_features_vanish():
    silent = jax.tree.map(jnp.zeros_like, params())  # every activation is zero
    assert (distance(silent, images(), images()[::-1]) == 0).all()
    np.testing.assert_array_equal(gradient(silent, images(), images()[::-1]), 0.0)


@pytest.mark.slow
def test_layers_add_up_and_a_target_is_seen_once():
    @jax.jit
    def parts(params, a, b):
        apply = functools.partial(NETWORK.apply, {"params": params})
        features = apply(a, method="features"), apply(b, method="features")
        return apply(*features, method="layer_distances"), apply(*features, method="distance")

    layers, found = parts(params(), images(), images()[:1])
    assert layers.shape == (4, 5)
    want = distance(params(), images(), jnp.repeat(images()[:1], 4, axis=0))
    np.testing.assert_allclose(layers.sum(axis=1), want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_small_images_are_refused():
    with pytest.raises(RearError, match="16 pixels or more"):
        NETWORK.apply({"params": params()}, images()[:, :15], method="features")


def test_published_files_give_the_parameters(files, tmp_path):
    chex.assert_trees_all_equal(lpips.load(**files), params())
    whole = {"scaling_layer.shift": np.zeros(3, np.float32)}  # as the state dict of a whole lpips.LPIPS has them
    whole |= {k.replace("lin", "lins."): v for k, v in tensors().items() if k.startswith("lin")}
    save_file(whole, tmp_path / "whole.safetensors")
    again = lpips.load(files["vgg16"], str(tmp_path / "whole.safetensors"))
    chex.assert_trees_all_equal(again, params())
    back = to_torch(again, lpips.torch_name)
    assert all(np.array_equal(back[key], value) for key, value in tensors().items())


def test_wrong_files_are_named(files, tmp_path):
    with pytest.raises(RearError, match=r"no checkpoint file .*vgg\.pth"):
        lpips.load(files["vgg16"], str(tmp_path / "vgg.pth"))
    with pytest.raises(RearError, match=r"vgg16\.safetensors has no tensor lin0\.model\.1\.weight: give the heads"):
        lpips.load(files["vgg16"], files["vgg16"])
    with pytest.raises(RearError, match=r"heads\.safetensors .*26 missing: features\.0\.bias"):
        lpips.load(files["heads"], files["heads"])
    heads = {k: v for k, v in tensors().items() if k.startswith("lin")}
    for bad in (-1e-3, np.nan):
        broken = heads | {"lin3.model.1.weight": np.full((1, 512, 1, 1), bad, np.float32)}
        save_file(broken, tmp_path / "bad.safetensors")
        with pytest.raises(RearError, match=r"bad\.safetensors: lin3\.model\.1\.weight has negative weights"):
            lpips.load(files["vgg16"], str(tmp_path / "bad.safetensors"))
    with pytest.raises(RearError, match=r"of another shape: features\.0\.weight"):
        lpips.params_from(tensors() | {"features.0.weight": np.zeros((64, 1, 3, 3), np.float32)})


class TestPerceptualNetwork:
    @pytest.mark.slow
    def test_lpips(self, files):
        settings = configs.default().lpips
        settings.update(files)
        network = perceptual.load("lpips", settings, option="config.x")
        a, b = images(), images()[::-1]
        found = jax.jit(network.distance)(network.params, a, b)
        np.testing.assert_allclose(found, distance(params(), a, b), rtol=1e-5)

    @pytest.mark.slow
    def test_efficientnet(self):
        network = perceptual.load("lite0", configs.default().lpips, option="config.x")
        assert jax.eval_shape(network.distance, network.params, images(), images()).shape == (4,)
        taps = jax.eval_shape(network.features, network.params, images())
        rng = np.random.default_rng(0)
        a, b = ([jnp.asarray(rng.normal(size=tap.shape), jnp.float32) for tap in taps] for _ in range(2))
        np.testing.assert_array_equal(network.compare(network.params, a, b), perceptual_distance(a, b))

    def test_refusals_name_the_setting(self, files):
        settings = configs.default().lpips
        with pytest.raises(RearError, match=r"config\.x = 'vgg' is no perceptual network: use one of lite0, lite2, lp"):
            perceptual.load("vgg", settings, option="config.x")
        with pytest.raises(RearError, match=r"config\.x = 'lpips' needs .* give config\.lpips\.vgg16"):
            perceptual.load("lpips", settings, option="config.x")
        settings.vgg16 = files["vgg16"]
        with pytest.raises(RearError, match=r"give config\.lpips\.heads, the lpips package's"):
            perceptual.load("lpips", settings, option="config.x")


def test_tokenizer_job_refuses_before_it_trains(tmp_path):
    with pytest.raises(RearError, match=r"config\.tokenizer_training\.perceptual_network = 'lpips' needs"):
        toy.run(tmp_path, "tokenizer", tokenizer_training__perceptual_network="lpips")


@pytest.mark.slow
def test_a_tokenizer_learns_through_lpips(files, tmp_path):
    changes = {"perceptual_network": "lpips", "perceptual_weight": 1.0, "loop__steps": 2, "loop__checkpoint_every": 2}
    changes = {f"tokenizer_training__{key}": value for key, value in changes.items()}
    toy.run(tmp_path, "tokenizer", **changes, **{f"lpips__{key}": value for key, value in files.items()})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["perceptual"] > 0.01


@pytest.mark.slow
def test_reconstructions_are_scored(files, trained, tmp_path, monkeypatch):
    """The job's LPIPS is the mean over pairs of 8-bit images, and its recipe names the weights."""
    seen = []
    describe = reference.describe
    monkeypatch.setattr(evaluate, "load_network", lambda settings: Network(colours(), "weights"))
    monkeypatch.setattr(
        reference, "describe", lambda images, *rest: describe((seen.append(x) or x for x in images), *rest)
    )
    workdir = shutil.copytree(trained, tmp_path / "copy")
    (workdir / "samples.npz").unlink()
    given = {"network": "inception", "num_reference": 10, "batch_size": 10, "kid_subset_size": 0}
    given = {f"evaluate__{key}": value for key, value in given.items()}
    toy.run(workdir, "evaluate", **given, **{f"lpips__{key}": value for key, value in files.items()})
    written = json.loads((workdir / "scores.json").read_text())
    floor, decoded = written["scores"].values()
    assert "LPIPS" not in floor
    before, after = (jnp.asarray(images / np.float32(255)) for images in seen[-2:])
    assert decoded["LPIPS"] == pytest.approx(float(distance(params(), before, after).mean()), rel=1e-4)
    assert fingerprint(params(), {}) in written["recipe"]["lpips"]
