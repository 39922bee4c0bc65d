"""What an evaluation is made of: archives read in pieces, references made once, the job with and without samples."""

import dataclasses
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tracemalloc

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import artifacts, tokenizers
from rear_jax.data.archive import ImageArchive
from rear_jax.errors import RearError
from rear_jax.evaluation.reconstructions import Reconstructions
from rear_jax.evaluation.reference import RealImages, ReferencePlan, plan_reference, prepare_reference, score_settings
from rear_jax.evaluation.samples import Samples, not_comparable, open_samples
from rear_jax.jobs import evaluate
from rear_jax.metrics import scores
from rear_jax.metrics.features import FeatureExtractor, Network, load_network
from rear_jax.metrics.inception_score import inception_score
from rear_jax.metrics.statistics import Gaussian
from rear_jax.weights.family import round_half_up, truncate
from tests import test_inception, toy
from tests.test_scores import batches, colours, np_moments, pictures


def archive(path) -> ImageArchive:
    return ImageArchive(path, remedy="fetch it again")


class TestArchive:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_pieces_are_the_whole(self, tmp_path, save):
        images, labels = pictures(0, count=23), np.arange(23)
        save(tmp_path / "a.npz", arr_0=images, labels=labels)
        opened = archive(tmp_path / "a.npz")
        assert (len(opened), opened.shape, opened.names) == (23, (23, 8, 8, 3), ("arr_0", "labels"))
        for size in (1, 10, 23, 100):
            pieces = list(opened.batches(size))
            assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
            np.testing.assert_array_equal(np.concatenate(pieces), images)
        np.testing.assert_array_equal(opened.read("labels"), labels)

    def test_memory_is_that_of_a_batch(self, tmp_path):
        np.savez(tmp_path / "a.npz", arr_0=np.zeros((400, 64, 64, 3), np.uint8))  # 4.9 MB
        tracemalloc.start()
        assert sum(len(batch) for batch in archive(tmp_path / "a.npz").batches(8)) == 400
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1e6

    def test_fingerprint_is_of_the_content(self, tmp_path):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            np.savez(tmp_path / f"{name}.npz", arr_0=pictures(seed))
        a, b, c = (archive(tmp_path / f"{name}.npz").fingerprint for name in "abc")
        assert a == b != c

    def test_refusals_name_file_and_remedy(self, tmp_path):
        path = tmp_path / "a.npz"
        with pytest.raises(RearError, match=r"a\.npz does not exist: fetch it again"):
            archive(path)
        np.savez(path, arr_0=pictures(0))
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(RearError, match=r"a\.npz cannot be read .*: fetch it again"):
            archive(path)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(RearError, match=r"a\.npz cannot be read .*CRC"):
            list(archive(path).batches(16))
        for wrong in (np.zeros((3, 8, 8, 3), np.float32), np.zeros((3, 8, 8), np.uint8)):
            np.savez(path, arr_0=wrong)
            with pytest.raises(RearError, match=r"wanted uint8 \[n, H, W, 3\]"):
                archive(path)
        np.savez(path, other=np.zeros(3))
        with pytest.raises(RearError, match=r"no images 'arr_0'"):
            list(archive(path).batches(16))
        with pytest.raises(RearError, match=r"labels is not a file in the archive"):
            archive(path).read("labels")


def inception_config(reference: str):
    return toy.config(evaluate__network="inception", evaluate__reference=str(reference), evaluate__kid_subset_size=10)


def statistics(width: int = 12, spatial: int = 8) -> dict[str, np.ndarray]:
    """Those of an ADM reference batch, at the widths of `colours`."""
    return {
        "mu": np.full(width, 0.5),
        "sigma": np.eye(width),
        "mu_s": np.full(spatial, 0.5),
        "sigma_s": 2.0 * np.eye(spatial),
    }


NETWORK = Network(colours(), "weights")


class TestReference:
    def prepare(self, config, folder, network=NETWORK):
        plan = plan_reference(config, network)
        return plan, prepare_reference(plan, network.extractor, config.evaluate, folder)

    def test_published_statistics_with_their_images(self, tmp_path):
        np.savez(tmp_path / "adm.npz", arr_0=pictures(1), **statistics())
        config = inception_config(tmp_path / "adm.npz")
        config.evaluate.num_compared = 10
        _, reference = self.prepare(config, tmp_path)
        assert reference.size == 8
        np.testing.assert_array_equal(reference.moments.covariance, np.eye(12))
        np.testing.assert_array_equal(reference.spatial.covariance, 2 * np.eye(8))
        pooled = np.asarray(NETWORK.extractor.apply(pictures(1))["pooled"])
        np.testing.assert_allclose(reference.features, pooled[::4], rtol=1e-6)
        assert "KID" in scores.score(
            reference, batches(pictures(0)), NETWORK.extractor, score_settings(config.evaluate)
        )

    def test_images_alone_and_statistics_alone(self, tmp_path):
        np.savez(tmp_path / "images.npz", arr_0=pictures(1))
        plan, reference = self.prepare(inception_config(tmp_path / "images.npz"), tmp_path)
        assert plan.statistics is None
        for found, wanted in zip(reference.moments, np_moments(reference.features), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-13)
        np.savez(tmp_path / "statistics.npz", **statistics())
        plan, reference = self.prepare(inception_config(tmp_path / "statistics.npz"), tmp_path)
        assert (reference.size, reference.features.shape) == (0, (0, 12))
        np.testing.assert_array_equal(reference.moments.mean, np.full(12, 0.5))

    def test_another_network_takes_no_statistics_of_inception(self, tmp_path):
        np.savez(tmp_path / "adm.npz", arr_0=pictures(1), **statistics())
        config, network = inception_config(tmp_path / "adm.npz"), Network(colours("Colours"), "weights")
        config.evaluate.network = "lite2"
        plan, reference = self.prepare(config, tmp_path, network)
        assert plan.statistics is None
        np.testing.assert_allclose(reference.moments.mean, reference.features.mean(0), rtol=1e-6)

    def test_training_images(self, tmp_path):
        config = inception_config("")
        plan, reference = self.prepare(config, tmp_path)
        assert (plan.size, reference.features.shape) == (32, (60, 12))
        images = RealImages(config.data, config.data.train_split, 60)
        np.testing.assert_array_equal(reference.labels, [images[i][1] for i in range(60)])

    def test_is_made_once_and_named_by_all_it_depends_on(self, tmp_path):
        np.savez(tmp_path / "a.npz", arr_0=pictures(1))
        config = inception_config(tmp_path / "a.npz")
        plan, first = self.prepare(config, tmp_path / "cache")
        blind = Network(NETWORK.extractor.__class__(**vars(NETWORK.extractor) | {"apply": None}), "weights")
        again, second = self.prepare(config, tmp_path / "cache", blind)  # takes no features
        assert plan.fingerprint == again.fingerprint == second.fingerprint
        np.testing.assert_array_equal(first.features, second.features)
        others = [plan_reference(config, NETWORK._replace(weights="others"))]
        config.evaluate.num_compared = 7
        others.append(plan_reference(config, NETWORK))
        for change in ({"num_reference": 59}, {"num_reference": 60}):
            config = inception_config("")
            config.evaluate.update(change)
            others.append(plan_reference(config, NETWORK))
        assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == 5

    def test_refusals(self, tmp_path):
        path = tmp_path / "a.npz"
        with pytest.raises(RearError, match=r"a\.npz does not exist: give config\.evaluate\.reference another"):
            self.prepare(inception_config(path), tmp_path)
        np.savez(path, mu=np.zeros(3))
        with pytest.raises(RearError, match="neither images arr_0 nor statistics"):
            self.prepare(inception_config(path), tmp_path)
        for wrong, message in (
            (statistics() | {"sigma": np.eye(3)}, r"mu \(12,\) and sigma \(3, 3\) are no moments of the network's 12"),
            (statistics(width=20), r"mu \(20,\) and sigma \(20, 20\) are no moments of the network's 12 features"),
            (statistics(spatial=9), r"mu_s \(9,\) and sigma_s \(9, 9\) are no moments of the network's 8 features"),
        ):
            np.savez(path, **wrong)
            with pytest.raises(RearError, match=message):
                plan_reference(inception_config(path), NETWORK)
        np.savez(path, **statistics())
        self.prepare(inception_config(path), tmp_path / "cache")
        (kept,) = (tmp_path / "cache").iterdir()
        kept.write_bytes(kept.read_bytes()[:100])
        with pytest.raises(RearError, match="delete it and run --job=evaluate again"):
            self.prepare(inception_config(path), tmp_path / "cache")
        with pytest.raises(RearError, match=r"needs its weights: give config\.evaluate\.inception"):
            load_network(inception_config("").evaluate)
        with pytest.raises(RearError, match="'vgg': use one of lite0, lite2, inception"):
            load_network(toy.config(evaluate__network="vgg").evaluate)
        with pytest.raises(RearError, match="kid_subset_size = 1: an unbiased KID needs 2 or more"):
            score_settings(toy.config(evaluate__kid_subset_size=1).evaluate)


class TestComparable:
    """50 000 images of 256 pixels need not exist to be asked about."""

    class Images:
        def __init__(self, count: int, size: int):
            self.shape = (count, size, size, 3)

    def reasons(
        self,
        *,
        network="Inception",
        file="6726825d0af5",
        reference=(10_000, 256),
        widths=(2048, 2023),
        count=50_000,
        classes=1000,
        size=256,
        skewed=False,
        recipe=None,
    ):
        extractor = FeatureExtractor(network, "", 2048, None, fid=network == "Inception")
        moments = tuple(Gaussian(np.zeros(width), None) for width in widths)
        plan = ReferencePlan(self.Images(*reference), "", "", reference[1], moments or None)
        labels = np.arange(count) % classes
        labels[0] += skewed
        samples = Samples(self.Images(count, size), labels, {"seed": 0} if recipe is None else recipe)
        return not_comparable(Network(extractor, "f00", file), plan, samples, classes)

    def test_only_by_the_protocol(self):
        assert self.reasons() == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"network": "EffNetLite2@224", "file": ""}, "the network is EffNetLite2@224, not Inception"),
            ({"file": "77a2"}, "its weights are not those of pt_inception-2015-12-05-6726825d.pth"),
            ({"widths": ()}, "the reference is no ADM reference batch of 256 pixels"),
            ({"widths": (2048, 2048)}, "the reference is no ADM reference batch of 256 pixels"),
            ({"reference": (10_000, 512)}, "the reference is no ADM reference batch of 256 pixels"),
            ({"reference": (9_999, 256)}, "the reference is no ADM reference batch of 256 pixels"),
            ({"count": 49_000}, "there are 49000 samples, 49 to 49 of each of 1000 classes, not 50 of each of 1000"),
            ({"classes": 100}, "there are 50000 samples, 500 to 500 of each of 100 classes, not 50 of each of 1000"),
            ({"skewed": True}, "there are 50000 samples, 49 to 51 of each of 1000 classes, not 50 of each of 1000"),
            ({"size": 384}, "the samples have 384x384 pixels, not 256x256"),
            ({"recipe": "unknown"}, "nothing says that the samples were drawn by class"),
            ({"recipe": {"captions": "f00"}}, "nothing says that the samples were drawn by class"),
        ],
    )
    def test_each_condition_is_named(self, change, reason):
        assert self.reasons(**change) == [reason]

    def test_no_samples(self):
        assert not_comparable(NETWORK, None, None, 10) == ["there are no samples"]


@pytest.fixture
def workdir(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def test_samples_that_are_not_all_there(workdir):
    with np.load(workdir / "samples.npz") as file:
        arrays = dict(file)
    np.savez(workdir / "samples.npz", arr_0=arrays["arr_0"][:20], labels=arrays["labels"][:20])
    with pytest.raises(RearError, match="holds 20 images where 24 were asked for"):
        open_samples(workdir)
    np.savez(workdir / "samples.npz", arr_0=arrays["arr_0"], labels=arrays["labels"][:20])
    with pytest.raises(RearError, match=r"labels is int32 \(20,\) for 24 images"):
        open_samples(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [truncate, round_half_up])
def test_reconstructions_count_every_image_once(trained, rule, monkeypatch):
    config = toy.config(evaluate__num_reference=20)
    family = dataclasses.replace(tokenizers.FAMILIES[config.tokenizer.name], to_8_bit=rule)
    monkeypatch.setattr(tokenizers, "family_of", lambda module: family)
    tokenizer = artifacts.load_tokenizer(config, trained)
    held_out, labels = RealImages(config.data, "test", 20), []
    through = Reconstructions(tokenizer, None)
    images = np.concatenate(list(held_out.batches(20, labels)))
    after = np.concatenate(list(through.over(held_out.batches(8, []))))
    assert (after.shape, after.dtype) == ((20, 32, 32, 3), np.uint8)
    found = through.scores()
    squared = ((images / 255.0 - after / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert found["PSNR"] == pytest.approx(np.mean(-10 * np.log10(squared)), rel=1e-4)
    assert -1 <= found["SSIM"] < 1
    encode = jax.jit(lambda images: tokenizer.module.apply({"params": tokenizer.params}, images, method="encode"))
    codes = np.asarray(encode(images / np.float32(255)))
    decode = jax.jit(lambda codes: tokenizer.module.apply({"params": tokenizer.params}, codes, method="decode"))
    assert (after != np.asarray(rule(decode(codes)))).mean() < 1e-3  # sums in another order
    shares = np.bincount(codes.ravel(), minlength=16) / codes.size
    assert found["codebook_usage"] == pytest.approx(np.mean(shares > 0))
    entropy = -np.sum(shares[shares > 0] * np.log(shares[shares > 0]))
    assert found["codebook_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-4)


@pytest.fixture
def quick_network(monkeypatch):
    """`colours` in place of Inception: the job without its slowest part."""
    monkeypatch.setattr(evaluate, "load_network", lambda settings: NETWORK)


@pytest.mark.slow
def test_the_job_with_inception_scores(workdir, tmp_path, quick_network):
    with np.load(workdir / "samples.npz") as file:
        samples = file["arr_0"]
    real = np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "adm.npz", arr_0=real, **statistics())
    changes = {"network": "inception", "reference": str(tmp_path / "adm.npz"), "kid_subset_size": 10}
    toy.run(workdir, "evaluate", **{f"evaluate__{key}": value for key, value in changes.items()})
    result = json.loads((workdir / "scores.json").read_text())
    of_samples, floor, decoded = result["scores"].values()
    assert list(of_samples) == list(floor) == ["FID", "sFID", "IS", "precision", "recall", "KID"]
    added = ["rFID", "PSNR", "SSIM", "codebook_usage", "codebook_perplexity"]
    assert list(decoded) == [*floor, *added]
    logits = np.asarray(NETWORK.extractor.apply(samples)["logits"])
    assert of_samples["IS"] == pytest.approx(inception_score(logits), rel=1e-6)
    recipe = result["recipe"]
    assert not recipe["comparable_with_published_FID"]
    assert (
        "there are 24 samples, 2 to 3 of each of 10 classes, not 50 of each of 1000" in recipe["not_comparable_because"]
    )
    assert {"generator_step", "generator", "tokenizer", "seed", "guidance"} <= recipe["samples"].keys()
    report = (workdir / "report.md").read_text()
    assert (
        "compares with no published one: its weights are not those of pt_inception-2015-12-05-6726825d.pth; " in report
    )
    assert len(list((workdir / "references").iterdir())) == 1


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        (8, {}, r"32x32 pixels do not compare with adm\.npz: 40 images of 8"),
        (32, {"kid_subset_size": 25}, "KID needs 25 images or more; there are 24, to compare with 40"),
        (32, {"num_compared": 9}, "KID needs 10 images or more; there are 24, to compare with 9"),
        (32, {"kid_subset_size": 0, "num_compared": 3}, "precision needs 4"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_network_runs(
    workdir, tmp_path, monkeypatch, size, changes, message
):
    blind = NETWORK.extractor.__class__(**vars(NETWORK.extractor) | {"apply": None})
    monkeypatch.setattr(evaluate, "load_network", lambda settings: Network(blind, "weights"))
    np.savez(tmp_path / "adm.npz", arr_0=pictures(1, size=size), **statistics())
    changes = {"network": "inception", "reference": str(tmp_path / "adm.npz"), "kid_subset_size": 10} | changes
    with pytest.raises(RearError, match=message):
        toy.run(workdir, "evaluate", **{f"evaluate__{key}": value for key, value in changes.items()})


@pytest.mark.slow
def test_a_tokenizer_alone(workdir, quick_network, caplog, monkeypatch):
    (workdir / "samples.npz").unlink()
    with caplog.at_level("INFO", "rear_jax"):
        monkeypatch.setattr(logging.getLogger("rear_jax"), "propagate", True)
        settings = {"network": "inception", "num_reference": 40, "kid_subset_size": 0}
        toy.run(workdir, "evaluate", **{f"evaluate__{key}": value for key, value in settings.items()})
    assert "evaluate: scoring the tokenizer on held-out images" in caplog.text
    result = json.loads((workdir / "scores.json").read_text())
    assert list(result["scores"]) == ["held-out real images (the floor)", "held-out images through the tokenizer"]
    assert result["recipe"]["not_comparable_because"] == ["there are no samples"]


@pytest.mark.slow
def test_the_whole_of_it_on_inception(workdir, tmp_path):
    save_file(test_inception.tensors(), tmp_path / "inception.safetensors")
    changes = {"network": "inception", "inception": str(tmp_path / "inception.safetensors"), "kid_subset_size": 10}
    changes |= {"num_reference": 12, "batch_size": 12}
    toy.run(workdir, "evaluate", **{f"evaluate__{key}": value for key, value in changes.items()})
    result = json.loads((workdir / "scores.json").read_text())
    assert all(np.isfinite(list(values.values())).all() for values in result["scores"].values())
    _, floor, decoded = (values["FID"] for values in result["scores"].values())
    assert 0 < floor < decoded
    digest = hashlib.sha256((tmp_path / "inception.safetensors").read_bytes()).hexdigest()
    assert result["recipe"]["weights_file_sha256"] == digest


@pytest.mark.slow
def test_three_devices_give_the_features_of_one():
    """An extractor whose parameters lie on all devices, on batches that three do not divide."""
    program = """
import jax, numpy as np
from rear_jax.metrics import efficientnet
from rear_jax.metrics.features import efficientnet_extractor, extract
images = np.random.default_rng(0).integers(256, size=(9, 32, 32, 3), dtype=np.uint8)
extractor = efficientnet_extractor(efficientnet.load("lite0"), "lite0", 32)
print(jax.device_count(), extract(extractor, [images[:4], images[4:8], images[8:]]).astype(float).sum(axis=1).tolist())
"""
    outputs = []
    for devices in (1, 3):
        finished = subprocess.run(
            [sys.executable, "-c", program], env=toy.environment(devices), capture_output=True, text=True, check=True
        )
        count, sums = finished.stdout.strip().split(" ", 1)
        assert int(count) == devices
        outputs.append(json.loads(sums))
    assert len(outputs[1]) == 9
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4)
