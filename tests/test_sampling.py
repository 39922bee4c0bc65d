"""The sampled set: interrupted and resumed, streamed to its file, resized, and cut where guidance ends."""

import errno
import importlib.metadata
import json
import os
import shutil
import signal
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from PIL import Image

from rear_jax import generators, tokenizers
from rear_jax.errors import RearError
from rear_jax.jobs import sample
from rear_jax.runtime import identity
from rear_jax.runtime.stopping import Interrupted
from rear_jax.sampling import resize
from rear_jax.sampling.generate import Sampler, generate, segment_bounds
from rear_jax.sampling.sampled_set import SampledSet
from tests import toy

TORCH = [  # interpolate(mode="bicubic") of a 6×6 image to 4×4, PyTorch 2.13
    [-0.773140609, -0.724058986, -0.664358974, -0.599944115],
    [-0.375922799, -0.283135414, -0.178568706, -0.074080989],
    [0.280914426, 0.390373200, 0.502057850, 0.602269709],
    [0.834472477, 0.894153535, 0.941882908, 0.971613646],
]


@pytest.fixture
def sampled(trained, tmp_path):
    """A copy of the trained workdir."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def unsampled(sampled):
    """The same without its samples."""
    for name in ("samples.npz", "samples.json", "samples.png"):
        (sampled / name).unlink()
    return sampled


def images_of(workdir):
    with np.load(workdir / "samples.npz") as file:
        return file["arr_0"]


def test_an_interrupted_set_goes_on_whatever_the_batch_size(trained, unsampled, monkeypatch):
    drawn, add = [], SampledSet.add

    def add_and_interrupt(self, indices, images):
        add(self, indices, images)
        drawn.extend(indices)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(SampledSet, "add", add_and_interrupt)
    now = identity.environment()
    monkeypatch.setattr(sample, "environment", lambda: {"jax": "0.1"})
    with pytest.raises(Interrupted, match="8 of 24 images are drawn; resume with the same command"):
        toy.run(unsampled, "sample")
    monkeypatch.setattr(sample, "environment", lambda: now)
    assert not (unsampled / "samples.npz").exists()
    monkeypatch.setattr(SampledSet, "add", lambda self, i, x: (drawn.extend(i), add(self, i, x)))
    toy.run(unsampled, "sample", sample__batch_size=5)
    assert sorted(drawn) == list(range(24))
    apart = np.abs(images_of(unsampled).astype(int) - images_of(trained))
    assert apart.max() <= 1  # sums in another order may round to the next of 256 levels
    assert (apart > 0).mean() < 1e-3
    assert not (unsampled / "samples.partial").exists()
    drawn_with = json.loads((unsampled / "samples.json").read_text())["drawn_with"]
    assert drawn_with == [{"jax": "0.1"}, now]


def test_another_recipe_begins_anew(tmp_path):
    shape = (3, 2, 2, 3)
    first = SampledSet(tmp_path / "s", {"seed": 0}, shape, write=True)
    first.add(np.array([1]), np.full((1, 2, 2, 3), 7, np.uint8))
    again = SampledSet(tmp_path / "s", {"seed": 0}, shape, write=True)
    assert again.done.tolist() == [False, True, False]
    assert (again.images[1] == 7).all()
    assert SampledSet(tmp_path / "s", {"seed": 0}, shape, write=False).done.tolist() == [False, True, False]
    assert not SampledSet(tmp_path / "s", {"seed": 1}, shape, write=True).done.any()


def test_a_set_has_its_space_from_the_start(tmp_path, monkeypatch):
    """A full disk shows at once, and as an error: writing to a map of a file with holes would kill the process."""
    shape = (30, 64, 64, 3)
    monkeypatch.setattr("os.posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        SampledSet(tmp_path / "s", {}, shape, write=True)
    monkeypatch.undo()
    assert not SampledSet(tmp_path / "s", {}, shape, write=True).done.any()
    assert (tmp_path / "s" / "images.npy").stat().st_blocks * 512 >= np.prod(shape)


def test_the_file_is_what_numpy_would_write(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (300, 2, 3, 3)).astype(np.uint8), np.arange(300, dtype=np.int32)
    partial = SampledSet(tmp_path / "s", {}, images.shape, write=True)
    partial.add(np.arange(300), images)
    partial.export(tmp_path / "samples.npz", labels)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "labels"}
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["labels"], labels)
        assert file["arr_0"].dtype == np.uint8
        assert file["labels"].dtype == np.int32


@pytest.mark.slow
def test_samples_as_pngs_and_of_another_size(unsampled):
    toy.run(unsampled, "sample", sample__png_folder=True, sample__image_size=24)
    images = images_of(unsampled)
    assert images.shape == (24, 24, 24, 3)
    assert len(list((unsampled / "samples").iterdir())) == 24
    np.testing.assert_array_equal(np.asarray(Image.open(unsampled / "samples" / "000013.png")), images[13])
    assert json.loads((unsampled / "samples.json").read_text())["image_size"] == 24


@pytest.mark.slow
def test_pngs_of_a_set_that_is_done(sampled, monkeypatch):
    stamp = (sampled / "samples.npz").stat().st_mtime_ns
    monkeypatch.setattr(sample, "CHUNK", 7)
    toy.run(sampled, "sample", sample__png_folder=True)
    files = sorted((sampled / "samples").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(24)]
    np.testing.assert_array_equal([np.asarray(Image.open(file)) for file in files], images_of(sampled))
    assert (sampled / "samples.npz").stat().st_mtime_ns == stamp
    written = files[0].stat().st_mtime_ns
    toy.run(sampled, "sample", sample__png_folder=True)
    assert files[0].stat().st_mtime_ns == written
    os.utime(sampled / "samples.npz")  # a newer set: the PNGs are another's
    toy.run(sampled, "sample", sample__png_folder=True)
    assert files[0].stat().st_mtime_ns > written


def test_only_its_own_left_over_is_removed_beside_a_set_that_is_done(sampled):
    done = json.loads((sampled / "samples.json").read_text())
    recipe = {key: value for key, value in done.items() if key not in ("stage", "drawn_with")}
    for of_set, kept in ((recipe, False), (recipe | {"seed": 9}, True)):
        SampledSet(sampled / "samples.partial", of_set, (24, 32, 32, 3), write=True)
        toy.run(sampled, "sample")
        assert (sampled / "samples.partial").exists() == kept


@pytest.mark.slow
def test_the_recipe_and_what_stands_beside_it(sampled, monkeypatch):
    written = json.loads((sampled / "samples.json").read_text())
    assert (written["generator_dtype"], written["tokenizer_dtype"]) == ("float32", "float32")
    assert (written["eight_bit"], written["stage"]) == ("truncate", "train")
    (environment,) = written["drawn_with"]
    assert environment["jaxlib"] == importlib.metadata.version("jaxlib")
    assert environment["platform"].startswith("cpu")
    stamp = (sampled / "samples.npz").stat().st_mtime_ns
    monkeypatch.setattr(sample, "environment", lambda: {"jax": "9"})
    toy.run(sampled, "sample")  # other versions leave a set as it is
    assert (sampled / "samples.npz").stat().st_mtime_ns == stamp
    toy.run(sampled, "sample", model__dtype="bfloat16")
    assert (sampled / "samples.npz").stat().st_mtime_ns != stamp
    assert json.loads((sampled / "samples.json").read_text())["drawn_with"] == [{"jax": "9"}]


def test_bicubic_is_pytorchs():
    image = np.cos(3 * np.sin(np.linspace(-1, 1, 216, dtype=np.float32))).reshape(2, 6, 6, 3)
    np.testing.assert_allclose(resize.bicubic(image, 4)[0, :, :, 0], TORCH, atol=1e-6)
    np.testing.assert_allclose(resize.bicubic(image, 6), image, atol=1e-6)
    np.testing.assert_allclose(resize.bicubic(np.ones((1, 5, 5, 3)), 9), 1.0, atol=1e-6)


def test_stretches_of_the_decoder():
    assert segment_bounds(16, 4) == [(1, 4), (4, 8), (8, 12), (12, 16)]
    assert segment_bounds(16, 4, cut=6) == [(1, 4), (4, 6), (6, 8), (8, 12), (12, 16)]
    assert segment_bounds(16, 4, cut=8) == segment_bounds(16, 4, cut=16) == segment_bounds(16, 4)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_after_its_interval_guidance_costs_nothing(interval):
    """The unconditional half is asked for the codes that are guided, and for no other; the logits say so too."""
    config = toy.llamagen_config()
    model = generators.build(config, tokenizers.build(config.tokenizer, config.data.image_size))
    params = jax.jit(model.init)(jax.random.key(0), *generators.family_of(model).example_inputs(model))["params"]
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    cached, keys = generators.cached(model), jax.random.split(jax.random.key(1), 3)
    labels, rows = np.array([0, 4]), np.array([0, 1, 1])
    sampler = Sampler("constant", 3.0, guidance_interval=interval)

    def run(params):
        return generate(cached, params, labels, rows, keys, sampler, return_logits=True)

    codes, logits = jax.jit(run)(params)
    guided = 16 if interval < 0 else min(16, interval + 2)
    everywhere = model.apply({"params": params}, codes, labels[rows]).logits
    without = model.apply({"params": params}, codes, np.full(3, 10)).logits
    np.testing.assert_allclose(logits[:, guided:], everywhere[:, guided:], atol=2e-4)
    wanted = without + 3.0 * (everywhere - without)
    np.testing.assert_allclose(logits[:, :guided], wanted[:, :guided], atol=2e-3)


@pytest.mark.slow
def test_too_many_images_for_the_disk_leave_no_damage(unsampled, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device", "images.npy")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(OSError, match="No space left"):
        toy.run(unsampled, "sample")
    monkeypatch.undo()
    toy.run(unsampled, "sample")
    assert images_of(unsampled).shape == (24, 32, 32, 3)


def test_an_unknown_guidance_is_named(unsampled):
    with pytest.raises(RearError, match=r"config\.sample\.guidance = 'none'"):
        toy.run(unsampled, "sample", sample__guidance="none")
