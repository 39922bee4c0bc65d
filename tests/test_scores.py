"""The scores of generated images: the numbers of the published packages, and what happens to degenerate input.

`REFERENCE` is the output of `tests/reference_metrics.py`, which also makes the inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.metrics import scores
from rear_jax.metrics.features import FeatureExtractor
from rear_jax.metrics.inception_score import inception_score
from rear_jax.metrics.kernel_distance import kernel_distance
from rear_jax.metrics.precision_recall import precision_recall
from rear_jax.metrics.similarity import psnr, ssim
from rear_jax.metrics.statistics import Gaussian, frechet_distance
from tests import reference_metrics

REFERENCE = {
    "fid_torch_fidelity": 22.315616672433634,
    "fid_pytorch_fid": 22.315616672433407,
    "inception_score": 2.735324465148451,
    "kid": 19.337480048071843,
    "torch_fidelity": {"precision": 0.9233333468437195, "recall": 0.6269230842590332},
    "prdc": {"precision": 0.9233333333333333, "recall": 0.6269230769230769},
    "ssim": [0.9885088248341701, 0.33010418210918524],
}

similarity = jax.jit(ssim)


class TestPublishedPackages:
    def test_frechet_distance(self):
        generated, real = map(scores.moments, reference_metrics.features())
        for package in ("torch_fidelity", "pytorch_fid"):
            assert frechet_distance(generated, real) == pytest.approx(REFERENCE[f"fid_{package}"], rel=1e-6)

    def test_inception_score(self):
        assert inception_score(reference_metrics.logits()) == pytest.approx(REFERENCE["inception_score"], rel=1e-9)

    def test_kernel_distance(self):
        found = kernel_distance(*reference_metrics.features(), subsets=7, subset_size=100)
        assert found == pytest.approx(REFERENCE["kid"], rel=1e-9)

    def test_precision_and_recall(self):
        generated, real = reference_metrics.features()
        found = precision_recall(real, generated)._asdict()
        for package in ("torch_fidelity", "prdc"):
            assert found == pytest.approx(REFERENCE[package], rel=1e-6)

    def test_structural_similarity(self):
        np.testing.assert_allclose(similarity(*reference_metrics.pictures()), REFERENCE["ssim"], rtol=1e-5)


class TestInceptionScore:
    def test_known_values(self):
        sure = np.tile(50.0 * np.eye(5), (20, 1))  # every split sees each of five classes alike, without doubt
        assert inception_score(sure) == pytest.approx(5.0, rel=1e-9)
        assert inception_score(np.zeros((30, 5))) == pytest.approx(1.0, rel=1e-12)
        assert inception_score(np.full((10, 2), 3.0) * [1, 500]) == pytest.approx(1.0, rel=1e-12)  # no 0 · log 0

    def test_the_order_matters_only_across_splits(self):
        logits = reference_metrics.logits()[:200]
        within = logits.reshape(10, 20, -1)[:, ::-1].reshape(200, -1)
        assert inception_score(within) == pytest.approx(inception_score(logits), rel=1e-12)
        across = logits.reshape(10, 20, -1).swapaxes(0, 1).reshape(200, -1)
        assert inception_score(across) != pytest.approx(inception_score(logits), rel=1e-6)

    def test_refusals(self):
        with pytest.raises(RearError, match="10 splits needs logits"):
            inception_score(np.zeros((9, 4)))
        with pytest.raises(RearError, match="NaN"):
            inception_score(np.full((20, 4), np.nan))


class TestKernelDistance:
    def test_known_value_on_whole_sets(self):
        x, y = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [2.0, 2.0]])
        # k(x, x') = (x·x'/2 + 1)³: 1 within x, 27 within y; across (2, 2; 1, 2)³ = 8, 8, 1, 8
        assert kernel_distance(x, y, subsets=3, subset_size=2) == pytest.approx(1 + 27 - 2 * 25 / 4, rel=1e-12)

    def test_two_halves_of_one_set_are_about_0(self):
        a, b = np.random.default_rng(0).normal(size=(2, 400, 8))
        assert abs(kernel_distance(a, b, subsets=10, subset_size=200)) < 0.1
        assert kernel_distance(a, b + 1.0, subsets=10, subset_size=200) > 1

    def test_refusals(self):
        some = np.zeros((20, 3))
        with pytest.raises(RearError, match="subsets of 1000 images cannot be had from 20 and 20"):
            kernel_distance(some, some)
        with pytest.raises(RearError, match="do not compare"):
            kernel_distance(some, np.zeros((20, 4)), subset_size=5)
        with pytest.raises(RearError, match="NaN"):
            kernel_distance(np.full_like(some, np.nan), some, subset_size=5)


class TestSimilarity:
    def test_psnr(self):
        a = jnp.full((2, 4, 4, 3), 0.5)
        b = a.at[0].add(0.1)
        np.testing.assert_allclose(psnr(a, b), [20.0, 100.0], rtol=1e-5)

    def test_ssim_of_equal_and_of_constant_images(self):
        a, b = reference_metrics.pictures()
        np.testing.assert_allclose(similarity(a, a), 1.0, rtol=1e-6)
        np.testing.assert_allclose(similarity(a, b), similarity(b, a), rtol=1e-5)
        black, grey = np.zeros((1, 11, 11, 3)), np.full((1, 11, 11, 3), 0.2)
        np.testing.assert_allclose(similarity(black, grey), 1e-4 / (0.04 + 1e-4), rtol=1e-4)
        with pytest.raises(RearError, match="11 pixels or more a side, these are 10x17"):
            ssim(a[:, :10], b[:, :10])


SETTINGS = scores.Settings(neighbours=3, kid_subsets=4, kid_subset_size=10)


def colours(name: str = "Inception", factor: float = 1.0) -> FeatureExtractor:
    """A stand-in for a network, by default for that of FID: means of an image's quarters as its features."""
    fid = name == "Inception"

    @jax.jit
    def apply(images):
        count, size = len(images), images.shape[1]
        quarters = images.reshape(count, 2, size // 2, 2, size // 2, 3).mean(axis=(2, 4)).reshape(count, -1) / 255.0
        wide = {"spatial": factor * quarters[:, :8], "logits": factor * quarters[:, :5]}
        return {"pooled": factor * quarters} | (wide if fid else {})

    return FeatureExtractor(name, "mean colours of the quarters", 12, apply, spatial_dim=8 if fid else 0, fid=fid)


def pictures(seed: int, count: int = 40, size: int = 8) -> np.ndarray:
    base = np.random.default_rng(seed).integers(256, size=(count, 2, 2, 3), dtype=np.uint8)
    return base.repeat(size // 2, axis=1).repeat(size // 2, axis=2)


def batches(images: np.ndarray, size: int = 16) -> list[np.ndarray]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def reference_of(images: np.ndarray, extractor: FeatureExtractor) -> scores.Reference:
    seen = scores.describe(extractor, batches(images))
    labels = np.zeros(len(images), np.int32)
    moments = scores.moments(seen.pooled)
    return scores.Reference("the real ones", "f00", images.shape[1], moments, seen.spatial, seen.pooled, labels)


class TestScore:
    def test_every_score_is_that_of_its_function(self):
        generated, real, extractor = pictures(0), pictures(1), colours()
        found = scores.score(reference_of(real, extractor), batches(generated), extractor, SETTINGS)
        assert list(found) == ["FID", "sFID", "IS", "precision", "recall", "KID"]
        a, b = (jax.device_get(extractor.apply(images)) for images in (generated, real))
        assert found["FID"] == pytest.approx(frechet_distance(*(scores.moments(x["pooled"]) for x in (a, b))), rel=1e-6)
        spatial = frechet_distance(*(scores.moments(x["spatial"]) for x in (a, b)))
        assert found["sFID"] == pytest.approx(spatial, rel=1e-6)
        assert found["IS"] == pytest.approx(inception_score(a["logits"]), rel=1e-6)
        shares = precision_recall(b["pooled"], a["pooled"])
        assert (found["precision"], found["recall"]) == pytest.approx(tuple(shares))
        kid = kernel_distance(a["pooled"], b["pooled"], subsets=4, subset_size=10)
        assert found["KID"] == pytest.approx(kid, rel=1e-6)

    def test_another_network_is_not_fid(self):
        extractor = colours("Colours")
        found = scores.score(reference_of(pictures(1), extractor), batches(pictures(0)), extractor, SETTINGS)
        assert list(found) == ["FD-Colours", "precision", "recall"]

    def test_the_batch_size_changes_nothing(self, monkeypatch):
        extractor = colours()
        whole, cut = (scores.describe(extractor, batches(pictures(0), size)) for size in (40, 7))
        np.testing.assert_array_equal(whole.pooled, cut.pooled)
        monkeypatch.setattr(scores, "ROWS", 9)  # the moments are then taken of parts
        parts = scores.describe(extractor, batches(pictures(0), 7))
        for mean_or_covariance, wanted in zip(parts.spatial, whole.spatial, strict=True):
            np.testing.assert_allclose(mean_or_covariance, wanted, rtol=1e-12, atol=1e-15)
        for mean_or_covariance, wanted in zip(scores.moments(whole.pooled), np_moments(whole.pooled), strict=True):
            np.testing.assert_allclose(mean_or_covariance, wanted, rtol=1e-10, atol=1e-13)

    def test_a_constant_set_has_the_distance_of_a_point(self):
        extractor, constant = colours(), np.full((40, 8, 8, 3), 51, np.uint8)
        reference = reference_of(pictures(1), extractor)
        found = scores.score(reference, batches(constant), extractor, SETTINGS)
        point = np.sum((reference.moments.mean - 0.2) ** 2) + np.trace(reference.moments.covariance)
        assert found["FID"] == pytest.approx(point, rel=1e-6)
        assert found["IS"] == pytest.approx(1.0, rel=1e-6)
        same = scores.score(reference_of(constant, extractor), batches(constant), extractor, SETTINGS)
        assert same["FID"] == pytest.approx(0.0, abs=1e-9)

    def test_statistics_alone_give_the_distances_alone(self):
        extractor = colours()
        full = reference_of(pictures(1), extractor)
        bare = scores.Reference("m", "f", 0, full.moments, None, np.zeros((0, 12), np.float32), np.zeros(0, np.int32))
        assert list(scores.score(bare, batches(pictures(0)), extractor, SETTINGS)) == ["FID", "IS"]

    def test_saved_and_loaded(self, tmp_path):
        reference = reference_of(pictures(1), colours())
        reference.save(tmp_path / "a.npz")
        again = scores.Reference.load(tmp_path / "a.npz")
        jax.tree.map(np.testing.assert_array_equal, vars(again), vars(reference))

    def test_refusals_are_one_line(self):
        extractor, reference = colours(), reference_of(pictures(1), colours())
        narrow = scores.Reference(**vars(reference) | {"moments": Gaussian(np.zeros(3), np.eye(3))})
        cases = [
            (reference, pictures(0, size=16), extractor, r"16x16 pixels do not compare with the real ones of 8"),
            (reference, pictures(0), colours(factor=np.nan), r"NaN or infinit"),
            (reference, pictures(0, count=1), extractor, r"at least 2 images, got 1"),
            (reference, pictures(0, count=8), extractor, r"10 splits needs logits"),
            (narrow, pictures(0), extractor, r"widths 12 and 3"),
            (reference, pictures(0)[:0], extractor, r"no images"),
        ]
        for given, images, network, message in cases:
            with pytest.raises(RearError, match=message) as caught:
                scores.score(given, batches(images), network, SETTINGS)
            assert "\n" not in str(caught.value)


class TestEnoughImages:
    @pytest.mark.parametrize(
        ("generated", "compared", "message"),
        [
            (1, 60, r"FID needs 2 images or more; there are 1, to compare with 60 of the reference: take more\."),
            (9, 60, r"IS needs 10 images or more; there are 9,"),
            (60, 3, r"precision needs 4 .* 60, to compare with 3 .* or lower config\.evaluate\.neighbours\."),
            (11, 60, r"KID needs 12 .* or lower config\.evaluate\.kid_subset_size \(0 = no KID\)\."),
            (60, 11, r"KID needs 12 images or more; there are 60, to compare with 11 of the reference"),
        ],
    )
    def test_refusals_before_any_image_is_looked_at(self, generated, compared, message):
        with pytest.raises(RearError, match=message):
            scores.require_images(colours(), scores.Settings(3, 4, 12), generated, compared)

    def test_what_suffices_for_every_score(self):
        """The smallest sets that are let through are scored."""
        for extractor, count, compared in ((colours(), 12, 12), (colours(), 10, 0), (colours("Colours"), 4, 4)):
            settings = scores.Settings(3, 2, 12 if count == 12 else 0)
            scores.require_images(extractor, settings, count, compared)
            reference = reference_of(pictures(1, count=max(compared, 2)), extractor)
            reference = scores.Reference(**vars(reference) | {"features": reference.features[:compared]})
            found = scores.score(reference, batches(pictures(0, count=count)), extractor, settings)
            assert np.isfinite(list(found.values())).all()


def test_a_recipe_without_kid_does_not_speak_of_it():
    assert "100 subsets of 12," in scores.recipe_of(colours(), scores.Settings(3, 100, 12))["kid"]
    assert "kid" not in scores.recipe_of(colours(), scores.Settings(3, 100, 0))


def np_moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False)
