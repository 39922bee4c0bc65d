"""What divided transformers send: FSDP gathers parameters, tensor parallelism adds up what Megatron-LM does."""

import collections
import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from rear_jax import generators
from rear_jax.generators.alitok.network import AliTokTransformer
from rear_jax.generators.janus.network import JanusTransformer
from rear_jax.generators.layers import HeadsLinear, Linear
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.generators.rar.network import RARTransformer
from rear_jax.plan import chips, hlo, programs, roofline
from rear_jax.runtime import sharding
from rear_jax.runtime.checkpoints import abstract
from rear_jax.runtime.mesh import AXES, make_mesh, split
from rear_jax.runtime.sharding import BATCH_AXES, HEAD_AXES, constrain
from tests import toy
from tests.test_configs import load

SIZES = {"codebook_size": 256, "num_classes": 7, "num_codes": 16, "width": 128, "depth": 3, "heads": 8}
MODELS = {
    "rar": RARTransformer(**SIZES, mlp_width=512, projector="released", projector_width=32, deep_layer=2),
    "llamagen": LlamaGenTransformer(**SIZES, mlp_width=512),
    "alitok": AliTokTransformer(**SIZES, mlp_width=512, prefix_tokens=7),
    "janus": JanusTransformer(**SIZES, mlp_width=512, vocabulary_size=64, prompt_length=8, pad_id=3),
}


def collectives(model, rows: int, *, gradients: bool, **sizes: int) -> list[hlo.Collective]:
    """Those of a batch's logits or gradients on eight devices that are not here."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, chips.topology("h100:8").devices)
    shapes = generators.shapes(model)
    places = sharding.shardings(shapes, mesh, generators.family_of(model).parameters)
    codes = jax.ShapeDtypeStruct((rows, model.num_codes), jnp.int32)
    batch = abstract((codes, generators.family_of(model).condition_shapes(model, rows)), split(mesh))

    def forward(params, batch):
        return model.apply({"params": params}, *batch)

    def loss(params, batch):
        return sum(jnp.mean(jnp.square(leaf)) for leaf in jax.tree.leaves(forward(params, batch)))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=places) if gradients else jax.jit(forward)
        lowered = program.lower(abstract(shapes, places), batch)
        return hlo.collectives(hlo.parse(lowered.compile(roofline.HOST_OPTIONS).as_text()))


def whole_bytes(found: list[hlo.Collective]) -> int:
    return sum(one.times * one.size for one in found)


@pytest.mark.parametrize("name", MODELS)
def test_fsdp_gathers_parameters_whatever_the_batch(name):
    """Forward and backward gather them, and gradients are added up: at most three times their size, and little else."""
    model = MODELS[name]
    small, large = (whole_bytes(collectives(model, rows, gradients=True, fsdp=8)) for rows in (16, 64))
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(generators.shapes(model)))
    assert 2 * parameters < small < 3.2 * parameters  # most of the RAR family's position tables are not read
    embedded = 2 * 64 * (model.num_codes + 2) * model.width * 4 / 8  # looked up by features, there and back
    assert large - small < 1.2 * embedded


@pytest.mark.parametrize("name", MODELS)
def test_a_block_under_tensor_parallelism_adds_up_twice(name):
    """After attention and after the MLP. Each block's qkv kernel is dealt out by heads; nothing of the batch's size is
    gathered, but for the modulation of the RAR family, whose residual stream is whole on every device."""
    model, rows = MODELS[name], 16
    found = collectives(model, rows, gradients=False, tensor=8)
    width, depth = model.width, model.depth
    positions = model.num_codes + {"rar": 2, "llamagen": 0, "alitok": 0, "janus": 7}[name]
    stream = rows * positions * width * 4
    times = collections.Counter()
    for one in found:
        times[one.kind, one.size] += one.times
    assert times["all-reduce", stream] - depth * 2 in (0, 1)  # and the embeddings, by vocabulary
    assert times["all-to-all", 3 * width * width * 4 // 8] == depth
    assert times["all-gather", 6 * stream] == (depth if name == "rar" else 0)
    repeated = {kind for (kind, size), count in times.items() if count % depth == 0 and size >= stream // 8}
    assert repeated <= {"all-reduce", "all-to-all"} | ({"all-gather"} if name == "rar" else set())


def test_queries_keys_and_values_are_those_of_a_linear_layer():
    """The same parameters, in the same places, from the same key, and the same outputs: old checkpoints can be read."""
    x = jax.random.normal(jax.random.key(1), (2, 5, 24))
    for bias in (True, False):
        heads = HeadsLinear(4, jnp.float32, use_bias=bias)
        linear = Linear(72, use_bias=bias, kernel_init=heads.kernel_init)
        params = linear.init(jax.random.key(0), x)
        chex.assert_trees_all_equal(params, heads.init(jax.random.key(0), x))
        out = heads.apply(params, x)
        assert out.shape == (2, 5, 3, 4, 6)
        np.testing.assert_allclose(out.reshape(2, 5, 72), linear.apply(params, x), atol=1e-6)


def test_what_the_mesh_does_not_divide_is_left_to_the_compiler():
    def constraint(shape, *axes):
        jaxpr = jax.make_jaxpr(lambda x: constrain(x, *axes))(jnp.zeros(shape))
        return [equation.params["sharding"].spec for equation in jaxpr.eqns]

    assert constraint((8, 4), BATCH_AXES, ()) == []
    for sizes, wanted in {(1, 1, 1): [], (2, 2, 2): [PartitionSpec(BATCH_AXES, None)]}.items():
        with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)):
            assert constraint((8, 4), BATCH_AXES, ()) == wanted
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)):
        free = PartitionSpec.UNCONSTRAINED
        assert constraint((1, 3), BATCH_AXES, HEAD_AXES) == [PartitionSpec(free, free)]


@pytest.mark.slow
def test_a_training_step_of_llamagen_3b_under_tensor_parallelism():
    """Two of its blocks at full width on 2 x 4 devices that are not here: a quarter of the parameters on each, and no
    gathering of activations; what four devices add up is the residual stream."""
    config = load(toy.ROOT / "configs" / "llamagen_3b_384.py")
    config.model.depth, config.model.remat, config.train.loop.batch_size = 2, "none", 4
    config.mesh.update({"data": 2, "fsdp": 1, "tensor": 4, "divide_state": False})
    mesh = make_mesh(config.mesh, chips.topology("h100:8").devices)
    program = programs.train(config, mesh)
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(program.held["parameters"]))
    held = roofline.held_bytes(program)
    assert held["parameters"] == pytest.approx(whole / 4, rel=0.03)  # all but norms and classes
    assert held["optimiser"] == pytest.approx(2 * held["parameters"], abs=64)

    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments).compile(roofline.HOST_OPTIONS)
    found = [one for one in hlo.collectives(hlo.parse(compiled.as_text())) if one.group == 4]
    times = collections.Counter()
    for one in found:
        times[one.kind] += one.times * one.size
    stream = 2 * 576 * config.model.width * 4  # rows of a device; the host's compiler widens bfloat16
    # in each block two forward, and backward one to the attention's input and one from each of gate and up; besides,
    # the embeddings, and backward the head's input
    assert times["all-reduce"] == pytest.approx((2 * 5 + 2) * stream, rel=0.01)
    # the blocks' qkv kernels, which are dealt out by heads forward and once more backward, and their gradients
    assert times["all-to-all"] == 2 * 3 * 3200 * 9600 * 4 // 4
    assert times["all-gather"] < 0.01 * stream


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_gathers_kernels_once_and_in_bfloat16():
    """Four blocks of reAR-B on 256 chips, each with a 256th of the state: nothing is gathered for each layer, and what
    devices add up for each layer is its gradient in float32."""
    config = load(toy.ROOT / "configs" / "rear_b.py")
    config.train.accumulation, config.model.remat, config.model.depth = 1, "none", 4
    topology = chips.topology("v5e:16x16")
    plan = roofline.make(config, "train", topology, quick=True)
    shapes = programs.train(config, make_mesh(config.mesh, topology.devices)).held["parameters"]
    whole = sum(4 * leaf.size for leaf in jax.tree.leaves(shapes))
    assert plan.held["parameters"] < 1.02 * whole / 256
    assert plan.working < 2 * whole + 2**30  # no further gradients or copies of that size beside the activations
    sizes = collections.Counter()
    for one in plan.collectives:
        sizes[one.kind, one.times] += one.times * one.size
    assert {times for kind, times in sizes if kind == "all-gather"} == {1}
    assert sizes["all-gather", 1] < whole / 2
    added = sizes["all-reduce", 4] + sizes["reduce-scatter", 4]
    assert added == pytest.approx(sum(4 * leaf.size for leaf in jax.tree.leaves(shapes["blocks"])), rel=0.02)
