"""The kernels between the products of RAR's blocks compute what the plain form does."""

import functools
import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from rear_jax.generators import modulated
from rear_jax.generators.dropout import Dropout, drop
from rear_jax.generators.modulated import Way, add_gated, add_gated_norm, norm
from rear_jax.generators.modulated_kernels import GATE_ATTENTION, SPARE, _block
from rear_jax.generators.rar.network import Block
from rear_jax.plan import hlo, kernels
from tests.test_attention import distance, mesh_on
from tests.test_kernels import bundles, needs_tpu_compiler

PLAIN, INTERPRETED = Way(fused=False), Way(fused=True, interpret=True)
NAMES = ("x", "mixed", "y", "norm1", "norm2", "modulation")


def inputs(length, width, rows=2, dtype=jnp.float32):
    """A residual stream, what attention and the MLP give, both norms, and a modulation."""
    keys = iter(jax.random.split(jax.random.key(length + width), 6))
    x, mixed, y = (jax.random.normal(next(keys), (rows, length, width)) for _ in range(3))
    norms = [jax.random.normal(next(keys), (2, width)) for _ in range(2)]
    modulation = jax.random.normal(next(keys), (rows, length, 6 * width), dtype)
    return x, mixed.astype(dtype), y.astype(dtype), *norms, modulation


def between(way, rate, dropout, x, mixed, y, norm1, norm2, modulation):
    """A block whose attention adds its input to `mixed`, and whose MLP adds the square of its input to `y`."""
    h, x, modulation = norm(x, norm1, modulation, way)
    x, h, modulation = add_gated_norm(x, mixed + h, norm2, modulation, rate, dropout and dropout.at(1), way)
    return add_gated(x, y + h * h, modulation, rate, dropout and dropout.at(2), way)


def value_and_gradients(way, rate, given):
    """By the name of what they are of."""
    dropout = Dropout.of(jax.random.key(3), jnp.arange(len(given[0]))) if rate else None
    weights = jax.random.normal(jax.random.key(4), given[0].shape, given[0].dtype)

    @jax.jit
    def run(*given):
        value, pull = jax.vjp(functools.partial(between, way, rate, dropout), *given)
        return {"value": value} | dict(zip(NAMES, pull(weights), strict=True))

    return run(*given)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "width", "rate"), [(18, 128, 0.1), (16, 256, 0.0), (5, 128, 0.5), (33, 384, 0.1)])
def test_kernels_are_the_plain_form(length, width, rate):
    got, wanted = (value_and_gradients(way, rate, inputs(length, width)) for way in (INTERPRETED, PLAIN))
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * float(jnp.abs(want).max()), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("length", [50, pytest.param(64, marks=pytest.mark.slow)])
def test_sequences_that_do_not_fit_on_the_chip_are_taken_in_blocks(monkeypatch, length):
    """Of 32 positions, of which the last block has fewer or as many."""
    monkeypatch.setattr(modulated, "fast_memory", lambda: SPARE + 2 * 32 * 256 * 4 * 11)
    got, wanted = (value_and_gradients(way, 0.1, inputs(length, 256)) for way in (INTERPRETED, PLAIN))
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * float(jnp.abs(want).max()), err_msg=name)


@pytest.mark.parametrize(
    ("length", "memory", "block"),
    [(258, 10**9, 258), (258, 264 * 100, 144), (1026, 550 * 100, 528), (10, 0, 10), (100, 0, 16)],
)
def test_blocks_are_equal_and_of_whole_registers(length, memory, block):
    assert _block(length, 50, SPARE + memory)[0] == block


@pytest.mark.slow
def test_kernels_of_bfloat16_are_as_good_as_the_plain_form():
    given = inputs(33, 128, dtype=jnp.bfloat16)
    fused, plain = (value_and_gradients(way, 0.1, given) for way in (INTERPRETED, PLAIN))
    with jax.enable_x64(True):
        exact = value_and_gradients(PLAIN, 0.1, [x.astype(jnp.float64) for x in given])
        for name, want in exact.items():
            assert distance(fused[name], want) <= 1.05 * distance(plain[name], want), name


@pytest.mark.slow
def test_the_mask_is_that_of_the_plain_form():
    """Of every element, at the attention's output and at the MLP's."""
    (x, mixed, _, norm1, _, _), dropout = inputs(35, 128), Dropout.of(jax.random.key(1), jnp.arange(2))
    gates = jnp.ones((2, 35, 6 * 128))
    x, _, _ = add_gated_norm(jnp.zeros_like(x), mixed, norm1, gates, 0.3, dropout, INTERPRETED)
    np.testing.assert_array_equal(x == 0, drop(mixed, 0.3, dropout) == 0)
    (of_mixed,) = jax.vjp(lambda y: add_gated(x, y, gates, 0.3, dropout, INTERPRETED), mixed)[1](jnp.ones_like(x))
    np.testing.assert_allclose(of_mixed, drop(jnp.ones_like(x), 0.3, dropout), rtol=1e-6)


@pytest.mark.slow
def test_a_gradient_of_the_modulation_that_is_handed_on_is_kept():
    """What reads other parts of it later gives their gradient."""
    x, _, _, norm1, _, modulation = inputs(16, 128)

    def parts(way):
        def loss(modulation):
            h, _, rest = norm(x, norm1, modulation, way)
            return jnp.sum(h * h) + jnp.sum(rest[..., GATE_ATTENTION * 128 :] ** 3)

        return jax.grad(loss)(modulation)

    np.testing.assert_allclose(parts(INTERPRETED), parts(PLAIN), rtol=1e-4, atol=1e-4)


def layers(monkeypatch, way, remat):
    """The gradients of three blocks in a scan by their input, condition and parameters."""
    monkeypatch.setattr(Way, "of", classmethod(lambda cls, attention, width: way))
    block = Block(128, 2, 256, 0.1, jnp.float32, "plain")
    x, condition, weights = jax.random.normal(jax.random.key(0), (3, 2, 9, 128))
    given = {"dropout": Dropout.of(jax.random.key(1), jnp.arange(2))}
    params = jax.vmap(lambda key: block.init(key, x, condition, **given)["params"])(jax.random.split(KEY, 3))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(KEY, p.shape), params)

    def loss(params, x, condition):
        def layer(x, params):
            return block.apply({"params": params}, x, condition, **given), None

        return jnp.sum(weights * jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, params)[0])

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, x, condition)


KEY = jax.random.key(2)


@pytest.mark.slow
def test_blocks_in_a_scan_with_remat_have_the_gradients_of_the_plain_form(monkeypatch):
    wanted = layers(monkeypatch, PLAIN, remat=False)
    got = layers(monkeypatch, INTERPRETED, remat=True)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("platform", "attention", "width", "fused"),
    [("tpu", "auto", 768, True), ("tpu", "plain", 768, False), ("tpu", "auto", 96, False), ("cpu", "auto", 768, False)],
)
def test_kernels_run_on_tpus_unless_a_config_wants_none(platform, attention, width, fused):
    with jax.sharding.use_abstract_mesh(mesh_on(platform)):
        assert Way.of(attention, width).fused == fused


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("chip", "length", "width"),
    [
        ("v4:2x2x1", 258, 1408),
        ("v4:2x2x1", 1026, 1024),
        ("v5e:2x2", 258, 768),
        ("v5p:2x2x1", 258, 1024),
        ("v6e:2x2", 258, 768),
    ],
)
def test_the_tpu_compiler_takes_the_kernels(monkeypatch, chip, length, width):
    """Of reAR-B, of the widest RAR, and of long sequences, which v4 takes in blocks; five kernels, all in bfloat16."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(chip, platform="tpu").devices[0]
    kind = device.device_kind
    place = jax.sharding.SingleDeviceSharding(device)
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for x in jax.eval_shape(lambda: inputs(length, width, dtype=jnp.bfloat16))
    ]

    def both(*given):
        return value_and_gradients(Way(fused=True), 0.1, given)

    with jax.sharding.use_abstract_mesh(mesh_on("tpu", kind)):
        program = jax.jit(both).lower(*given).compile()
    assert {kernel.name for kernel in kernels.found(hlo.parse(program.as_text()))} == {
        "modulated_norm_forward",
        "modulated_norm_backward",
        "gated_norm_forward",
        "gated_norm_backward",
        "gated_backward",
    }


def on_a_chip(words, *given):
    """What benchmarks/kernel_bundles.py counts the bundles of."""
    return between(Way(fused=True), 0.1, Dropout(words), *given)


@pytest.mark.slow
@needs_tpu_compiler
def test_with_the_tpu_compiler_the_formulas_of_the_kernels_meet_their_bundles():
    for width in (512, 768):
        shapes = jax.eval_shape(lambda width=width: inputs(258, width, 8, jnp.bfloat16))
        arrays = [f"{x.dtype.name}[{','.join(map(str, x.shape))}]" for x in shapes]
        rows = bundles("tests.test_modulated:on_a_chip", "int32[8,2]", *arrays, "--gradient")
        assert len(rows) == 5
        for row in rows:
            counted, formula = (float(cell) for cell in row[-2:])
            assert abs(formula / counted - 1) < 0.15, row
