"""FID's Inception: its resize by the rule, and its file with everything that can be wrong with it.

That the network's outputs are right is for the golden `inception_fid`.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.metrics import inception
from rear_jax.metrics.inception import InceptionV3, Outputs, convolve, resize
from tests.golden_checks.inception_fid import weights

GOLDEN = pathlib.Path(__file__).with_name("goldens") / "inception_fid.npz"


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as golden:
        meta = json.loads(str(golden["meta"]))
    return weights(meta["seed"], meta["order"])


def test_resize_is_tensorflow_1():
    image = jnp.asarray([[0, 10], [100, 50]], jnp.uint8)[None, :, :, None]
    # places 0, 1/2, 1, 3/2 of two pixels: beyond the last one it is repeated
    want = [[0, 5, 10, 10], [50, 40, 30, 30], [100, 75, 50, 50], [100, 75, 50, 50]]
    np.testing.assert_allclose(resize(image, 4)[0, :, :, 0], want)
    row = jnp.arange(8.0)[None, None, :, None].repeat(3, axis=1)
    np.testing.assert_allclose(resize(row, 3)[0, 0, :, 0], [0, 8 / 3, 16 / 3], rtol=1e-6)  # no antialiasing
    np.testing.assert_array_equal(resize(row[:, :, :3], 3), row[:, :, :3])


def test_outputs_have_the_published_widths():
    shapes = jax.eval_shape(
        lambda images: InceptionV3().init_with_output(jax.random.key(0), images)[0], jnp.zeros((2, 299, 299, 3))
    )
    assert shapes == Outputs(*(jax.ShapeDtypeStruct((2, n), jnp.float32) for n in (64, 192, 768, 2048, 2023, 1008)))


@pytest.mark.slow
def test_spatial_features_are_seven_channels_of_6d():
    """What ADM's evaluator calls mixed_6/conv is the 1×1 branch of 6d: not the one of 6e."""
    params = inception.params_from(tensors())
    run = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images).spatial)
    image = resize(jax.random.uniform(jax.random.key(0), (1, 32, 32, 3), maxval=255.0))

    def without(name):
        branch = jax.tree.map(lambda leaf: np.where(np.arange(192) < 7, 0.0, leaf), params[name]["branch1x1"])
        return run(params | {name: params[name] | {"branch1x1": branch}}, image)

    spatial = run(params, image)
    assert (spatial > 0).any()
    np.testing.assert_array_equal(without("Mixed_6e"), spatial)
    np.testing.assert_array_equal(without("Mixed_6d"), 0.0)
    assert (spatial.reshape(17, 17, 7) > 0).any(axis=(0, 1)).sum() > 3  # channels come last


def test_every_key_of_the_file_is_accounted_for():
    assert len(tensors()) == 94 * 5 + 2
    counters = {f"{key.removesuffix('weight')}num_batches_tracked": np.int64(0) for key in tensors() if ".bn.w" in key}
    params = inception.params_from(tensors() | counters)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    in_file = sum(
        t.size for k, t in tensors().items() if k != "fc.bias" and not k.endswith((".bn.weight", "_mean", "_var"))
    )
    assert count == in_file
    np.testing.assert_array_equal(params["fc"]["kernel"], tensors()["fc.weight"].T)


def test_folding_is_the_batch_norm():
    random = np.random.default_rng(0)
    layer = {"a.conv.weight": random.normal(size=(3, 2, 1, 1))}
    layer |= {f"a.bn.{part}": random.uniform(0.5, 2, 3) for part in ("weight", "bias", "running_mean", "running_var")}
    folded, x = inception.fold_batch_norm(layer), random.normal(size=2)
    y = (layer["a.conv.weight"][:, :, 0, 0] @ x - layer["a.bn.running_mean"]) / np.sqrt(
        layer["a.bn.running_var"] + 1e-3
    )
    want = y * layer["a.bn.weight"] + layer["a.bn.bias"]
    np.testing.assert_allclose(folded["a.conv.weight"][:, :, 0, 0] @ x + folded["a.conv.bias"], want, rtol=1e-5)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(RearError, match=r"no checkpoint file .*inception\.pth"):
        inception.load(str(tmp_path / "inception.pth"))
    save_file({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, tmp_path / "vgg16.safetensors")
    with pytest.raises(RearError, match=r"vgg16\.safetensors does not fit this network: 189 missing"):
        inception.load(str(tmp_path / "vgg16.safetensors"))
    name = "Mixed_6d.branch1x1.bn.running_var"
    wrong = {"AuxLogits.fc.weight": np.ones(1), "Mixed_9z.bn.weight": np.ones(1), "fc.weight": np.ones((1000, 2048))}
    cases = [
        ({name: None}, rf"no {name} of 192 values"),
        ({name: np.ones(7, np.float32)}, rf"no {name} of 192 values"),
        (
            wrong,
            r"2 unexpected: AuxLogits\.fc\.weight, Mixed_9z\.bn\.weight; 1 of another shape: fc\.weight \(2048, 1000\)",
        ),
        ({"fc.weight": np.full((1008, 2048), np.nan, np.float32)}, r"NaN or infinite"),
    ]
    for change, message in cases:
        changed = {key: value for key, value in (tensors() | change).items() if value is not None}
        with pytest.raises(RearError, match=message) as caught:
            inception.params_from(changed)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        (9, (1, 1), 1, "SAME"),
        (9, (3, 3), 2, "VALID"),
        (10, (3, 3), 2, "VALID"),
        (81, (3, 3), 1, "SAME"),
        (80, (3, 3), 1, "VALID"),
    ],
)
def test_convolutions_as_matrix_products(size, kernel, stride, padding):
    image_key, kernel_key = jax.random.split(jax.random.key(0))
    images = jax.random.normal(image_key, (2, size, size, 4))
    filters = jax.random.normal(kernel_key, (*kernel, 4, 5))
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": jax.lax.Precision.HIGHEST}
    found = convolve(images, filters, (stride, stride), padding, **settings)
    expected = jax.lax.conv_general_dilated(images, filters, (stride, stride), padding, **settings)
    np.testing.assert_allclose(found, expected, atol=1e-5)
