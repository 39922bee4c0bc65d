"""Which attention kernel runs where, and that splash attention computes what the plain form does."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rear_jax import generators
from rear_jax.errors import RearError
from rear_jax.generators import attention_kernels
from rear_jax.generators.attention import causal_attention
from rear_jax.generators.attention_kernels import choose, cudnn_attention, splash_attention
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.runtime.mesh import AXES
from tests import toy

FITS = {"dtype": "bfloat16", "head_size": 64, "dropout": 0.0, "masked": False}
MODEL = LlamaGenTransformer(
    codebook_size=12,
    num_classes=5,
    num_codes=9,
    width=16,
    depth=2,
    heads=2,
    mlp_width=32,
    dropout=0.1,
    token_dropout=0.0,
    dtype=jnp.bfloat16,
)
interpreted = functools.partial(splash_attention, interpret=True)
plain = functools.partial(causal_attention, kernel="plain")


def mesh_on(platform: str) -> AbstractMesh:
    """One device of a platform that need not be here."""
    device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    return AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


@pytest.fixture(params=["cpu", "tpu", "gpu", "old gpu"])
def machine(request, monkeypatch):
    """The name of a machine, under its mesh; of GPUs, one that has flash attention and one that has not."""
    monkeypatch.setattr(attention_kernels, "_has_flash_attention", lambda: request.param == "gpu")
    with jax.sharding.use_abstract_mesh(mesh_on(request.param.split()[-1])):
        yield request.param


@pytest.mark.parametrize(
    ("change", "kernels"),
    [
        ({}, {"gpu": "cudnn", "tpu": "splash"}),
        ({"dtype": "float16"}, {"gpu": "cudnn"}),
        ({"dtype": "float32"}, {}),
        ({"head_size": 128}, {"gpu": "cudnn", "tpu": "splash"}),
        ({"head_size": 136}, {"tpu": "splash"}),
        ({"head_size": 60}, {"tpu": "splash"}),
        ({"dropout": 0.1}, {}),
        ({"masked": True}, {}),
    ],
)
def test_auto_is_the_fused_kernel_that_can_run(machine, change, kernels):
    assert choose("auto", **FITS | change) == kernels.get(machine, "plain")
    assert choose("plain", **FITS | change) == "plain"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cudnn", {"dtype": "float32"}, "takes bfloat16 or float16, not float32"),
        ("cudnn", {"head_size": 60}, "takes heads of a multiple of 8 up to 128 features, not 60"),
        ("cudnn", {"dropout": 0.1}, r"has no dropout of attention weights, and config\.model\.dropout = 0\.1"),
        ("splash", {"dropout": 0.1}, r"has no dropout of attention weights, and config\.model\.dropout = 0\.1"),
        ("splash", {"masked": True}, "hides no positions"),
        ("splash", {"dtype": "float32"}, "takes bfloat16, to which it rounds its factors, not float32"),
    ],
)
def test_a_kernel_that_is_named_and_cannot_run_is_refused(machine, name, change, reason):
    if machine == {"cudnn": "gpu", "splash": "tpu"}[name]:
        assert choose(name, **FITS) == name
    else:
        reason, change = rf"runs on .*, not on {machine.split()[-1]}", {}
    with pytest.raises(RearError, match=rf"config\.model\.attention = '{name}' {reason}.*: use 'auto' or 'plain'\."):
        choose(name, **FITS | change)


@pytest.mark.parametrize(("capability", "able"), [("7.5", False), ("8.0", True), ("10.3", True), ("gfx942", False)])
def test_only_new_nvidia_gpus_have_flash_attention(monkeypatch, capability, able):
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention_kernels._has_flash_attention() is able


def test_an_unknown_kernel_names_the_known_ones():
    with pytest.raises(RearError, match=r"config\.model\.attention = 'flash': use one of auto, plain, cudnn, splash\."):
        toy.generator(toy.config(model__attention="flash"))


def test_a_model_names_its_kernel():
    model = dataclasses.replace(MODEL, attention="splash")
    with pytest.raises(RearError, match="runs on TPUs, not on cpu"):
        generators.shapes(model)


@pytest.mark.parametrize(("length", "head_size"), [(5, 16), (258, 24)])  # neither is a multiple of the kernel's block
def test_splash_attention_is_the_plain_form(length, head_size):
    inputs = [jax.random.normal(jax.random.key(i), (2, length, 2, head_size)) for i in range(4)]

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(attention, *inputs):
        *inputs, weights = inputs
        outputs, gradients_of = jax.vjp(attention, *inputs)
        return outputs, *gradients_of(weights)

    wanted = outputs_and_gradients(plain, *inputs)
    for got, want in zip(outputs_and_gradients(interpreted, *inputs), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def lowered(function, *inputs, platform: str) -> str:
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()


def gradients(model):
    """(parameters, codes, labels) -> gradients of a training loss."""

    def loss(params, codes, labels):
        out = model.apply({"params": params}, codes, labels, train=True, rngs={"dropout": jax.random.key(0)})
        return jnp.mean(jnp.square(out.logits))

    return jax.grad(loss)


def test_a_model_runs_on_the_kernel_of_its_mesh():
    """Forward, and backward to queries and to keys and values, are one splash kernel each on a TPU, none on a CPU."""
    inputs, params = generators.family_of(MODEL).example_inputs(MODEL), generators.shapes(MODEL)
    with jax.sharding.use_abstract_mesh(mesh_on("tpu")):
        assert lowered(gradients(MODEL), params, *inputs, platform="tpu").count("tpu_custom_call") == 3
    with jax.sharding.use_abstract_mesh(mesh_on("cpu")):
        assert "custom_call_target" not in lowered(gradients(MODEL), params, *inputs, platform="cpu")


def test_cudnn_attention_lowers_to_its_custom_calls(monkeypatch):
    """Forward and backward; jax asks for cuDNN's version already when it traces."""
    internals = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internals, "check_cudnn_version", lambda: 91000)
    x = jnp.zeros((2, 258, 4, 48), jnp.bfloat16)
    text = lowered(jax.grad(lambda x: cudnn_attention(x, x, x).astype(jnp.float32).sum()), x, platform="cuda")
    assert "__cudnn$fmhaSoftmax" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "258x258" not in text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_takes_splash_attention_and_needs_less_memory(monkeypatch):
    """reAR-B's heads in a scan on four chips, forward and backward, divided by rows and by heads."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    heads = jax.ShapeDtypeStruct((64, 258, 16, 48), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def temporary(kernel: str) -> tuple[int, int]:
        """Kernels in the program, and bytes that it needs besides its inputs."""

        def loss(x):
            layers = jnp.ones(6, x.dtype)
            x, _ = jax.lax.scan(lambda x, w: (x + causal_attention(w * x, x, x, kernel=kernel), None), x, layers)
            return x.astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss)).lower(heads).compile()
        return program.as_text().count("tpu_custom_call"), program.memory_analysis().temp_size_in_bytes

    with jax.set_mesh(mesh):
        kernels, fused = temporary("auto")
        none, unfused = temporary("plain")
    assert (kernels, none) == (3, 0)
    assert fused < unfused / 2
