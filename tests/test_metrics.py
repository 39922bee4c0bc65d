"""Image metrics: known values, agreement with direct formulas, and what happens to degenerate input."""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet, lpips
from rear_jax.metrics.efficientnet import EfficientNetLite
from rear_jax.metrics.features import FeatureExtractor, efficientnet_extractor, extract
from rear_jax.metrics.precision_recall import kth_smallest, precision_recall
from rear_jax.metrics.probe import fit_probe
from rear_jax.metrics.statistics import Gaussian, GaussianStatistics, frechet_distance


def gaussian(features: np.ndarray) -> Gaussian:
    return GaussianStatistics.empty(features.shape[1]).update(features).finish()


class TestStatistics:
    def test_batches_and_merges_equal_numpy(self):
        features = np.random.default_rng(0).normal(size=(101, 5)) @ np.diag([1, 2, 3, 4, 5])
        first = GaussianStatistics.empty(5).update(features[:1]).update(features[1:40]).update(features[:0])
        second = GaussianStatistics.empty(5).update(features[40:].astype(np.float64))
        for mean, covariance in (first.merge(second).finish(), second.merge(first).finish(), gaussian(features)):
            np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
            np.testing.assert_allclose(covariance, np.cov(features.T), rtol=1e-12, atol=1e-12)

    def test_a_large_mean_costs_no_digits(self):
        features = np.random.default_rng(0).normal(size=(1000, 3))
        statistics = GaussianStatistics.empty(3)
        for batch in np.split(features + 1e7, 10):
            statistics = statistics.update(batch)
        np.testing.assert_allclose(statistics.finish().covariance, np.cov(features.T), atol=1e-7)

    def test_refusals(self):
        statistics = GaussianStatistics.empty(3)
        with pytest.raises(RearError, match="at least 2 images, got 1"):
            statistics.update(np.zeros((1, 3))).finish()
        with pytest.raises(RearError, match="NaN"):
            statistics.update(np.array([[0, np.nan, 0]]))
        with pytest.raises(RearError, match="width 3"):
            statistics.update(np.zeros((2, 4)))
        with pytest.raises(RearError, match="widths 3 and 4"):
            statistics.merge(GaussianStatistics.empty(4))


class TestFrechet:
    def test_known_values(self):
        zero, one = np.zeros(3), np.eye(3)
        assert frechet_distance(Gaussian(zero, one), Gaussian(zero, one)) == pytest.approx(0, abs=1e-12)
        shifted = Gaussian(np.array([1.0, -2.0, 2.0]), one)
        assert frechet_distance(Gaussian(zero, one), shifted) == pytest.approx(9.0, rel=1e-12)
        # diagonal: the sum of the squared differences of standard deviations
        a, b = Gaussian(zero, np.diag([1.0, 4.0, 9.0])), Gaussian(zero, np.diag([4.0, 4.0, 0.0]))
        assert frechet_distance(a, b) == pytest.approx(1 + 0 + 9, rel=1e-12)

    def test_singular_and_constant_sets(self):
        rng = np.random.default_rng(0)
        few = gaussian(rng.normal(size=(4, 32)))  # rank 3
        assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)
        constant = gaussian(np.full((5, 32), 2.0))
        assert frechet_distance(constant, constant) == 0
        expected = np.sum((few.mean - 2.0) ** 2) + np.trace(few.covariance)
        assert frechet_distance(few, constant) == pytest.approx(expected, rel=1e-10)

    def test_few_images_lose_no_digits(self):
        """Their features without the mean are factors too, by which the distance is known exactly."""
        rng = np.random.default_rng(2)
        sets = [rng.normal(size=(count, 300)) for count in (12, 20)]
        one, two = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in sets)
        overlap = np.linalg.svd(one @ two.T, compute_uv=False).sum()
        expected = np.sum((sets[0].mean(axis=0) - sets[1].mean(axis=0)) ** 2) + np.sum(one**2) + np.sum(two**2)
        assert frechet_distance(*map(gaussian, sets)) == pytest.approx(expected - 2 * overlap, rel=1e-12)

    def test_equals_the_matrix_square_root(self):
        rng = np.random.default_rng(1)
        a, b = (
            gaussian(rng.normal(size=(400, 20)) @ rng.normal(size=(20, 20)) + rng.normal(size=20)) for _ in range(2)
        )
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)

    def test_refusals(self):
        with pytest.raises(RearError, match="widths 2 and 3"):
            frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))
        with pytest.raises(RearError, match="NaN"):
            frechet_distance(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(2), np.full((2, 2), np.nan)))


class TestPrecisionRecall:
    def test_identical_and_disjoint_sets(self):
        points = np.random.default_rng(0).normal(size=(60, 8))
        assert precision_recall(points, points[::-1]) == (1.0, 1.0)
        assert precision_recall(points, points + 1e3) == (0.0, 0.0)

    def test_collapsed_generator_has_precision_without_recall(self):
        points = np.random.default_rng(0).normal(size=(60, 8))
        collapsed = np.repeat(points[:1], 60, axis=0) + 1e-4 * np.random.default_rng(1).normal(size=(60, 8))
        result = precision_recall(points, collapsed)
        assert result.precision == 1.0
        assert result.recall <= 1 / 60

    @pytest.mark.parametrize("neighbours", [1, 3])
    def test_equals_brute_force_across_blocks(self, neighbours):
        rng = np.random.default_rng(2)
        real, generated = rng.normal(size=(700, 6)) + 50.0, rng.normal(size=(530, 6)) * 0.8 + 50.5

        def share(points, centres):
            between = np.linalg.norm(centres[:, None] - centres, axis=-1)
            radii = np.sort(between, axis=1)[:, neighbours]  # column 0 is the point itself
            return np.mean((np.linalg.norm(points[:, None] - centres, axis=-1) <= radii).any(axis=1))

        expected = share(generated, real), share(real, generated)
        assert min(expected) > 0.3
        assert max(expected) < 1
        np.testing.assert_allclose(precision_recall(real, generated, neighbours), expected, atol=1e-12)

    def test_takes_no_second_copy_in_float64(self):
        rng = np.random.default_rng(0)
        real, generated = (rng.normal(size=(n, 512)).astype(np.float32) for n in (64, 4000))
        tracemalloc.start()
        precision_recall(real, generated)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.6 * generated.nbytes  # a copy in float32 and a few blocks; one in float64 is twice the bytes

    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_kth_smallest_counts_equal_ones_apiece(self, k):
        values = np.random.default_rng(0).integers(6, size=(40, 9)).astype(np.float32)
        np.testing.assert_array_equal(jax.jit(kth_smallest, static_argnums=1)(values, k), np.sort(values)[:, k - 1])

    def test_refusals(self):
        points = np.zeros((5, 2))
        with pytest.raises(RearError, match="do not compare"):
            precision_recall(points, np.zeros((5, 3)))
        with pytest.raises(RearError, match="more than 3 images"):
            precision_recall(points, points[:3])
        with pytest.raises(RearError, match="NaN"):
            precision_recall(points, np.full((5, 2), np.nan))


class TestProbe:
    def classes(self, seed: int, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
        """Three well separated classes in the first two of five features, on very different scales."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(3, size=n)
        centres = np.array([[0, 0], [6, 0], [0, 6]])[labels]
        features = np.concatenate([centres + rng.normal(size=(n, 2)), rng.normal(size=(n, 3))], axis=1)
        return (features * [1e-3, 1e3, 1, 1, 1]).astype(np.float32), labels + 5

    def test_learns_separable_classes_and_sees_wrong_labels(self):
        probe = fit_probe(*self.classes(0))
        features, labels = self.classes(1)
        assert probe.real_accuracy > 0.95
        assert probe.accuracy(features, labels) > 0.95
        assert probe.accuracy(features, (labels - 5 + 1) % 3 + 5) < 0.05

    def test_is_deterministic(self):
        weights = [fit_probe(*self.classes(0)).classifier[-1].coef_ for _ in range(2)]
        np.testing.assert_array_equal(*weights)

    def test_noise_is_at_chance(self):
        rng = np.random.default_rng(0)
        probe = fit_probe(rng.normal(size=(600, 4)), rng.integers(2, size=600))
        assert 0.35 < probe.real_accuracy < 0.65

    def test_refusals(self):
        features, labels = self.classes(0)
        with pytest.raises(RearError, match="saw no real image of class 9"):
            fit_probe(features, labels).accuracy(features[:1], np.array([9]))
        with pytest.raises(RearError, match="at least two classes"):
            fit_probe(features, np.zeros_like(labels))
        with pytest.raises(RearError, match=r"features \[n, D\] and labels \[n\]"):
            fit_probe(features, labels[1:])
        with pytest.raises(RearError, match="NaN"):
            fit_probe(np.full_like(features, np.nan), labels)


perceptual_distance = jax.jit(lpips.perceptual_distance)


class TestPerceptualDistance:
    def taps(self, seed: int) -> list[jax.Array]:
        rng = np.random.default_rng(seed)
        return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 4, 4, 3), (2, 2, 2, 5))]

    def test_known_value(self):
        # Tap 1: unit vectors at a right angle at one of two pixels, 2 / 2; tap 2: opposite ones, 4.
        a = [jnp.array([[[[3.0, 0.0], [1.0, 1.0]]]]), jnp.array([[[[2.0]]]])]
        b = [jnp.array([[[[0.0, 5.0], [2.0, 2.0]]]]), jnp.array([[[[-7.0]]]])]
        np.testing.assert_allclose(perceptual_distance(a, b), [(1 + 4) / 2], rtol=1e-6)

    def test_symmetric_scale_free_and_zero_on_itself(self):
        a, b = self.taps(0), self.taps(1)
        np.testing.assert_allclose(perceptual_distance(a, b), perceptual_distance(b, a), rtol=1e-6)
        scaled = [7.0 * tap for tap in a]
        np.testing.assert_allclose(perceptual_distance(scaled, b), perceptual_distance(a, b), rtol=1e-5)
        np.testing.assert_allclose(perceptual_distance(a, a), [0, 0], atol=1e-12)

    def test_gradient(self):
        check_grads(lambda a: perceptual_distance(a, self.taps(1)), (self.taps(0),), order=1, modes=["rev"], eps=1e-2)

    def test_no_nan_at_zero_vectors_or_identical_images(self):
        gradient = jax.jit(jax.grad(lambda a, b: perceptual_distance(a, b).sum()))
        a = [tap.at[0, 0, 0].set(0.0) for tap in self.taps(0)]
        for tap in gradient(a, a):
            np.testing.assert_allclose(tap, 0, atol=1e-7)
        for tap in gradient(a, self.taps(1)):
            assert np.isfinite(tap).all()
            np.testing.assert_array_equal(tap[0, 0, 0], 0)
        np.testing.assert_array_equal(lpips.normalise_channels(a[0])[0, 0, 0], 0)

    @pytest.mark.slow
    def test_through_the_network_at_identical_and_black_images(self):
        network, params = EfficientNetLite("lite0"), efficientnet.load("lite0")
        image = jnp.zeros((1, 16, 16, 3)).at[0, 4:9, 3:12, 1].set(0.8)

        @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles in half the time
        @jax.value_and_grad
        def distance(a, b, params):
            return perceptual_distance(*(network.apply({"params": params}, x).taps for x in (a, b))).sum()

        value, gradient = distance(image, image, params)
        np.testing.assert_allclose(value, 0, atol=1e-9)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)
        value, gradient = distance(jnp.zeros_like(image), image, params)
        assert value > 0.05
        assert np.isfinite(gradient).all()


class TestFeatures:
    def test_partial_batch_is_padded_and_cut(self):
        shapes = []

        def mean_colour(batch):
            shapes.append(batch.shape)
            return {"pooled": jnp.asarray(batch, jnp.float32).mean(axis=(1, 2))}

        images = np.random.default_rng(0).integers(256, size=(11, 4, 6, 3), dtype=np.uint8)
        extractor = FeatureExtractor(name="colour", recipe="mean colour", dim=3, apply=mean_colour)
        features = extract(extractor, (images[i : i + 4] for i in range(0, 11, 4)))
        assert shapes == [(4, 4, 6, 3)] * 3
        np.testing.assert_allclose(features, images.mean(axis=(1, 2)), rtol=1e-5)
        with pytest.raises(RearError, match="no images"):
            extract(extractor, [])
        with pytest.raises(RearError, match="batch of 5 rows follows a first one of 4"):
            extract(extractor, [images[:4], images[:5]])

    @pytest.mark.slow
    def test_efficientnet_reads_bytes_and_floats_alike_and_each_image_by_itself(self):
        extractor = efficientnet_extractor(efficientnet.load("lite0"), "lite0", 32)
        assert (extractor.name, extractor.dim) == ("EffNetLite0@32", 1280)
        images = np.random.default_rng(0).integers(256, size=(3, 24, 20, 3), dtype=np.uint8)
        features = extract(extractor, [images[:2], images[2:]])
        assert features.shape == (3, 1280)
        assert features.dtype == np.float32
        np.testing.assert_allclose(extract(extractor, [images[1:] / np.float32(255)]), features[1:], atol=1e-4)
