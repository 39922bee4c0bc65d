"""Flash attention on GPUs: it computes what the plain form does, and becomes kernels of Triton."""

import dataclasses
import functools
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators
from rear_jax.errors import RearError
from rear_jax.generators import attention_kernels
from rear_jax.generators.attention_kernels import choose, flash_on_mesh
from rear_jax.generators.flash_attention import LEAST, Shape
from rear_jax.generators.heads import Preparation
from tests.test_attention import (
    FITS,
    MODEL,
    PROBLEMS,
    distance,
    gradient_of_layers,
    gradients,
    lowered,
    mesh_on,
    plain_form,
    problem,
    value_and_gradients,
    written_out,
)
from tests.toy import ROOT, environment

HEAD_SIZES = (48, 64, 80, 88, 96, 128)
SMALL = {
    "RAR": {"length": 66, "size": 48, "heads": 2, "norm": "layer", "rate": 0.1},
    "AliTok": {"length": 40, "size": 64, "heads": 2, "norm": "rms", "turned": 1, "rate": 0.1},
    "LlamaGen": {"length": 64, "size": 64, "heads": 2, "turned": 1},
    "captions and dropout": {"length": 75, "size": 80, "heads": 1, "masked": True, "rate": 0.5},
    "few positions": {"length": 5, "size": 8, "heads": 3, "rate": 0.1},
    "one position": {"length": 1, "size": 16, "heads": 1, "masked": True},
}
interpreted = functools.partial(flash_on_mesh, interpret=True)


def assert_is_the_plain_form(arguments, weights):
    """Value and gradients of projection and norms."""
    wanted = value_and_gradients(plain_form, arguments, weights)
    for got, want in zip(value_and_gradients(interpreted, arguments, weights), wanted, strict=True):
        assert distance(got, want) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_flash_attention_is_the_plain_form(name):
    """With the same mask of dropout."""
    assert_is_the_plain_form(*problem(**SMALL[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_flash_attention_is_the_plain_form_in_every_family(name):
    assert_is_the_plain_form(*problem(**PROBLEMS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("length", [258, 274, 375, 578, 1026])
def test_flash_attention_is_the_plain_form_at_every_size(length, size):
    assert_is_the_plain_form(*problem(length, size, 1, norm="layer", rate=0.1, rows=1, masked=length == 375))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("RAR", "bfloat16"), ("AliTok", "bfloat16"), pytest.param("RAR", "float16", marks=pytest.mark.slow)],
)
def test_flash_attention_of_two_bytes_is_as_good_as_the_plain_form(name, dtype):
    """Against float64: in the mean over output and gradients, and none much worse; but for the bias of the keys."""
    arguments, weights = problem(**SMALL[name], dtype=jnp.dtype(dtype))
    flash, plain = (value_and_gradients(form, arguments, weights) for form in (interpreted, plain_form))
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: x.astype(jnp.float64), x) for x in (*arguments[:2], weights)]
        wanted = value_and_gradients(written_out, (*wide[:2], *arguments[2:]), wide[2])
    ours, theirs = ([distance(x, y) for x, y in zip(xs[:5], wanted[:5], strict=True)] for xs in (flash, plain))
    assert np.mean(ours) < 1.02 * np.mean(theirs)
    assert all(a < 1.2 * b + 1e-4 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.slow
def test_dropout_keeps_what_the_plain_form_keeps():
    """Bit for bit: with values that are rows of the identity, outputs are the weights themselves."""
    length = 64
    (qkv, _, _, rate, dropout), _ = problem(length, length, 2, rate=0.3)
    qkv = qkv.at[:, :, 2].set(jnp.eye(length)[:, None])
    ours, plain = (form(qkv, Preparation(), None, rate, dropout) != 0 for form in (interpreted, plain_form))
    np.testing.assert_array_equal(ours, plain)
    assert 0.25 < 1 - ours.sum() / (2 * 2 * length * (length + 1) / 2) < 0.35


def test_flash_attention_under_scan_and_remat():
    assert distance(gradient_of_layers(interpreted), gradient_of_layers(plain_form)) < 1e-5


def test_blocks_are_powers_of_two():
    for length, size, itemsize in [(1, 8, 4), (258, 48, 2), (1026, 88, 4), (33, 128, 2)]:
        shape = Shape(length, size)
        blocks = shape.blocks(itemsize)
        for count in (blocks.own, blocks.other, shape.features):
            assert count >= LEAST
            assert count & (count - 1) == 0
        assert blocks.own % blocks.other == 0  # so a program's own positions begin where one of the other blocks does
        assert shape.features >= size


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_flash_attention_lowers_for_gpus(size, dtype):
    """Forward and backward, without a GPU; no array of [T, T] or of filled up heads."""
    arguments, weights = problem(258, size, 3, norm="layer", rate=0.1, masked=True, dtype=jnp.dtype(dtype))

    def both_ways(qkv, weights):
        out, pull_back = jax.vjp(lambda qkv: flash_on_mesh(qkv, *arguments[1:]), qkv)
        return out, *pull_back(weights)

    with jax.sharding.use_abstract_mesh(mesh_on("gpu")):
        text = lowered(both_ways, arguments[0], weights, platform="cuda")
    assert text.count("__gpu$xla.gpu.triton") == 3
    for name in ("flash_forward", "flash_backward_queries", "flash_backward_keys"):
        assert text.count(f'name = "{name}"') == 1
    assert "258x258" not in text
    assert size == 128 or "x128x" not in text


@pytest.mark.slow
@pytest.mark.skipif("REAR_CUDA_PLUGIN" not in os.environ, reason="set REAR_CUDA_PLUGIN to a folder with JAX's plugin")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_triton_compiler_takes_flash_attention(dtype):
    """For GPUs that are not here, of three generations: every kernel multiplies on tensor cores, and fits into the
    99 KiB that a core of the smallest has. Elements of two bytes are copied 16 bytes at a time."""
    capabilities, sizes = ("8.0", "9.0", "10.0"), ("48", "88", "128")
    command = [sys.executable, "-m", "tests.triton_compiler", ",".join(capabilities), dtype, ",".join(sizes)]
    environ = environment()
    environ["PYTHONPATH"] += os.pathsep + os.environ["REAR_CUDA_PLUGIN"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(capabilities) * len(sizes) * 3
    for _, _, _, _, memory, products, *copies in rows:
        assert int(memory) <= 99 * 1024
        assert int(products) > 0
        assert dtype == "float32" or copies == ["10"]  # hexadecimal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "takes bfloat16, float16, float32, not float64"),
        ({"size": 136}, "takes heads of up to 128 features, not 136"),
    ],
)
def test_what_flash_cannot_do_is_said(monkeypatch, change, reason):
    monkeypatch.setattr(attention_kernels, "_has_flash_attention", lambda: True)
    with jax.sharding.use_abstract_mesh(mesh_on("gpu")):
        assert choose("flash", FITS._replace(rate=0.1, masked=True)) == "flash"
        with pytest.raises(RearError, match=reason):
            choose("flash", FITS._replace(**change))


def test_a_model_trains_on_flash_attention(monkeypatch):
    """Three kernels in the loops over its layers."""
    monkeypatch.setattr(attention_kernels, "_has_flash_attention", lambda: True)
    with jax.sharding.use_abstract_mesh(mesh_on("gpu")):
        for name, count in (("flash", 3), ("plain", 0)):
            model = dataclasses.replace(MODEL, attention=name)
            inputs, params = generators.family_of(model).example_inputs(model), generators.shapes(model)
            text = lowered(gradients(model), params, *inputs, platform="cuda")
            assert text.count("__gpu$xla.gpu.triton") == count


def test_flash_runs_on_gpus_alone():
    with pytest.raises(
        RearError, match=r"'flash' runs on NVIDIA GPUs of compute capability 8\.0 or higher, not on cpu"
    ):
        choose("flash", FITS)


@pytest.mark.parametrize(("checked", "kernel"), [(set(), "plain"), ({"9.0"}, "flash"), ({"8.0"}, "plain")])
def test_auto_takes_flash_where_it_was_checked(monkeypatch, checked, kernel):
    """There it goes before cuDNN's, which is slower; elsewhere cuDNN's goes first where it can run."""
    device = type("Device", (), {"compute_capability": "9.0"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(attention_kernels, "FLASH_CHECKED", frozenset(checked))
    with jax.sharding.use_abstract_mesh(mesh_on("gpu")):
        assert choose("auto", FITS._replace(rate=0.1)) == kernel
        assert choose("auto", FITS._replace(masked=True)) == kernel
        assert choose("auto", FITS) == ("flash" if kernel == "flash" else "cudnn")
        assert choose("auto", FITS._replace(dtype="float32")) == "plain"  # what was measured had two bytes


def test_cudnn_still_has_no_dropout_with_a_seed_for_each_step(monkeypatch):
    """Its public call has none, its private one writes the seed into the program. If that changes, weigh it again."""
    assert not {"dropout_rate", "seed"} & inspect.signature(jax.nn.dot_product_attention).parameters.keys()
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internals, "check_cudnn_version", lambda: 91000)
    x = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)

    def attend(x, seed):
        return internals.dot_product_attention(x, x, x, dropout_rate=0.1, seed=seed)

    assert '"seed": 3' in lowered(functools.partial(attend, seed=3), x, platform="cuda").replace("\\22", '"')
    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(attend).trace(x, jax.ShapeDtypeStruct((), jnp.int32))
