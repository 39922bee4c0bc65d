"""Which attention kernel runs where, and that each computes what the plain form does."""

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
from rear_jax.generators.attention import self_attention
from rear_jax.generators.attention_kernels import Task, choose, cudnn_attention, fused_on_mesh, splash_attention
from rear_jax.generators.dropout import Dropout, drop_weights
from rear_jax.generators.fused_attention import fused_attention
from rear_jax.generators.heads import HalfSplitRotation, Norm, Preparation, Rotation
from rear_jax.generators.llamagen.network import LlamaGenTransformer
from rear_jax.runtime.mesh import AXES
from tests import toy

FITS = Task("bfloat16", length=258, heads=12, size=64, rate=0.0, masked=False)
MODEL = LlamaGenTransformer(
    codebook_size=12,
    num_classes=5,
    num_codes=9,
    width=128,
    depth=2,
    heads=2,
    mlp_width=32,
    dropout=0.1,
    token_dropout=0.0,
    dtype=jnp.bfloat16,
)


def plain(queries, keys, values):
    """The plain form, of heads that are prepared."""
    mixed = self_attention(jnp.stack([queries, keys, values], 2), Preparation(), kernel="plain")
    return mixed.reshape(queries.shape)


interpreted = functools.partial(splash_attention, interpret=True)


def mesh_on(platform: str, kind: str = "") -> AbstractMesh:
    """One device of a platform that need not be here."""
    kind = kind or ("NVIDIA H100 80GB HBM3" if platform == "gpu" else "TPU v5 lite")
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
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
        ({}, {"gpu": "cudnn", "tpu": "fused"}),
        ({"dtype": "float16"}, {"gpu": "cudnn"}),
        ({"dtype": "float32"}, {"tpu": "fused"}),
        ({"size": 128}, {"gpu": "cudnn", "tpu": "fused"}),
        ({"size": 136, "heads": 16}, {"tpu": "fused"}),
        ({"size": 60}, {"tpu": "splash"}),
        ({"heads": 3}, {"gpu": "cudnn", "tpu": "splash"}),
        ({"length": 1027}, {"gpu": "cudnn", "tpu": "splash"}),
        ({"rate": 0.1}, {"tpu": "fused"}),
        ({"masked": True}, {"tpu": "fused"}),
        ({"masked": True, "length": 1100}, {}),
    ],
)
def test_auto_is_the_kernel_that_can_run(machine, change, kernels):
    assert choose("auto", FITS._replace(**change)) == kernels.get(machine, "plain")
    assert choose("plain", FITS._replace(**change)) == "plain"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("cudnn", {"dtype": "float32"}, "takes bfloat16 or float16, not float32"),
        ("cudnn", {"size": 60}, "takes heads of a multiple of 8 up to 128 features, not 60"),
        ("cudnn", {"rate": 0.1}, r"has no dropout of attention weights, and config\.model\.dropout = 0\.1"),
        ("splash", {"rate": 0.1}, r"has no dropout of attention weights, and config\.model\.dropout = 0\.1"),
        ("splash", {"masked": True}, "hides no positions"),
        ("splash", {"dtype": "float32"}, "takes bfloat16, to which it rounds its factors, not float32"),
        ("fused", {"dtype": "float16"}, "takes bfloat16 or float32, not float16"),
        ("fused", {"size": 60}, "takes heads of a multiple of 8 features, together a multiple of 128, not 12 of 60"),
        ("fused", {"length": 2000}, "takes whole sequences into 128 MiB on the chip: 2000 positions are too long"),
        ("fused", {"heads": 256, "size": 128}, "takes whole sequences into 128 MiB on the chip: 258 positions"),
    ],
)
def test_a_kernel_that_is_named_and_cannot_run_is_refused(machine, name, change, reason):
    if machine == {"cudnn": "gpu", "splash": "tpu", "fused": "tpu"}[name]:
        assert choose(name, FITS) == name
    else:
        reason, change = rf"runs on .*, not on {machine.split()[-1]}", {}
    with pytest.raises(RearError, match=rf"config\.model\.attention = '{name}' {reason}.*: use 'auto' or 'plain'\."):
        choose(name, FITS._replace(**change))


@pytest.mark.parametrize(("kind", "kernel"), [("TPU v4", "splash"), ("TPU v5", "fused"), ("TPU v6 lite", "fused")])
def test_a_chip_with_little_memory_of_its_own_takes_narrow_sequences_alone(kind, kernel):
    """LlamaGen-XL at 384 px takes 27 MiB; the cores of v4 have 16."""
    with jax.sharding.use_abstract_mesh(mesh_on("tpu", kind)):
        assert choose("auto", FITS._replace(length=576, heads=20)) == kernel
        assert choose("auto", FITS) == "fused"


@pytest.mark.parametrize(("capability", "able"), [("7.5", False), ("8.0", True), ("10.3", True), ("gfx942", False)])
def test_only_new_nvidia_gpus_have_flash_attention(monkeypatch, capability, able):
    device = type("Device", (), {"compute_capability": capability})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert attention_kernels._has_flash_attention() is able


def test_an_unknown_kernel_names_the_known_ones():
    with pytest.raises(
        RearError, match=r"config\.model\.attention = 'fast': use one of auto, plain, fused, flash, cudnn, splash\."
    ):
        toy.generator(toy.config(model__attention="fast"))


def test_a_model_names_its_kernel():
    model = dataclasses.replace(MODEL, attention="splash")
    with pytest.raises(RearError, match="runs on TPUs, not on cpu"):
        generators.shapes(model)


@pytest.mark.slow
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
        dropout = Dropout.of(jax.random.key(0), jnp.arange(len(labels)))
        out = model.apply({"params": params}, codes, labels, dropout=dropout)
        return jnp.mean(jnp.square(out.logits))

    return jax.grad(loss)


def test_a_model_runs_on_the_kernel_of_its_mesh():
    """Forward and backward are one kernel each on a TPU, none on a CPU."""
    inputs, params = generators.family_of(MODEL).example_inputs(MODEL), generators.shapes(MODEL)
    with jax.sharding.use_abstract_mesh(mesh_on("tpu")):
        assert lowered(gradients(MODEL), params, *inputs, platform="tpu").count("tpu_custom_call") == 2
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


def problem(
    length, size, heads, *, norm="", turned=0, kind=Rotation, masked=False, rate=0.0, rows=2, dtype=jnp.float32
):
    """Random arguments of `self_attention` besides the kernel's name, and weights of its output."""
    keys = iter(jax.random.split(jax.random.key(length + size), 12))

    def norm_of():
        scale, bias = (0.3 * jax.random.normal(next(keys), (size,)) for _ in range(2))
        return Norm(1 + scale, bias if norm == "layer" else None) if norm else None

    norms, rotation = (norm_of(), norm_of()), None
    if turned:  # 1: all images alike, 2: each in its own way
        angles = jax.random.normal(next(keys), (length, size // 2) if turned == 1 else (rows, length, size // 2))
        rotation = kind(jnp.cos(angles), jnp.sin(angles))
    visible = jax.random.bernoulli(next(keys), 0.5, (rows, length)) if masked else None
    dropout = Dropout.of(next(keys), jnp.arange(rows)) if rate else None
    qkv = jax.random.normal(next(keys), (rows, length, 3, heads, size), dtype)
    weights = jax.random.normal(next(keys), (rows, length, heads * size), dtype)
    return (qkv, Preparation(*norms, rotation), visible, rate, dropout), weights


def plain_form(qkv, preparation, visible, rate, dropout):
    """`self_attention` in its plain form, with the arguments of `fused_on_mesh`."""
    return self_attention(qkv, preparation, kernel="plain", visible=visible, rate=rate, dropout=dropout)


def value_and_gradients(attention, arguments, weights):
    """The output of an attention, and the gradients of the projection and of both norms."""

    @jax.jit
    def run(qkv, queries, keys, weights):
        def of(qkv, queries, keys):
            preparation = Preparation(queries, keys, arguments[1].rotation)
            return attention(qkv, preparation, *arguments[2:])

        with jax.default_matmul_precision("highest"):
            out, pull_back = jax.vjp(of, qkv, queries, keys)
            return out, *pull_back(weights)

    return jax.tree.leaves(run(arguments[0], *arguments[1][:2], weights))


def distance(a, b) -> float:
    """Relative to b; the bias of the keys' norm has no gradient but for rounding, as softmax does not see it."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 10.0)


PROBLEMS = {
    "RAR": {"length": 258, "size": 48, "heads": 8, "norm": "layer", "rate": 0.1},
    "RAR, wide": {"length": 130, "size": 88, "heads": 16, "norm": "layer", "rate": 0.1, "rows": 1},
    "AliTok": {"length": 274, "size": 64, "heads": 2, "norm": "rms", "turned": 1, "rate": 0.1},
    "AliTok in random orders": {"length": 40, "size": 64, "heads": 4, "norm": "rms", "turned": 2, "rate": 0.1},
    "LlamaGen": {"length": 256, "size": 64, "heads": 2, "turned": 1},
    "LlamaGen of captions": {"length": 375, "size": 64, "heads": 2, "turned": 1, "masked": True},
    "Janus": {"length": 140, "size": 128, "heads": 1, "turned": 1, "kind": HalfSplitRotation, "masked": True},
    "halves of small heads": {"length": 40, "size": 24, "heads": 16, "turned": 2, "kind": HalfSplitRotation},
    "captions and dropout": {"length": 150, "size": 80, "heads": 8, "masked": True, "rate": 0.5, "rows": 1},
    "few positions": {"length": 5, "size": 16, "heads": 8, "rate": 0.1},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "RAR, wide" else []) for name in PROBLEMS]
)
def test_fused_attention_is_the_plain_form(name):
    """Value and gradients, with the same mask of dropout."""
    arguments, weights = problem(**PROBLEMS[name])
    fused = functools.partial(fused_on_mesh, interpret=True)
    wanted = value_and_gradients(plain_form, arguments, weights)
    for got, want in zip(value_and_gradients(fused, arguments, weights), wanted, strict=True):
        assert distance(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("length", "size"), [(258, 64), (258, 96), (258, 128), (578, 80), (1026, 48)])
def test_fused_attention_is_the_plain_form_at_every_size(length, size):
    arguments, weights = problem(length, size, 128 // size or 1, norm="layer", rate=0.1, rows=1)
    fused = functools.partial(fused_on_mesh, interpret=True)
    wanted = value_and_gradients(plain_form, arguments, weights)
    for got, want in zip(value_and_gradients(fused, arguments, weights), wanted, strict=True):
        assert distance(got, want) < 1e-5


def written_out(qkv, preparation, visible, rate, dropout):
    """The same in the dtype of its arguments throughout, for float64; of RAR's and AliTok's heads."""
    queries, keys, values = jnp.moveaxis(qkv, 2, 0)

    def prepared(x, norm):
        x = x if norm.bias is None else x - x.mean(-1, keepdims=True)
        x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + (1e-5 if norm.bias is None else 1e-6)) * norm.scale
        x = x if norm.bias is None else x + norm.bias
        if preparation.rotation is None:
            return x
        pairs = x[..., ::2] + 1j * x[..., 1::2]
        turned = pairs * (preparation.rotation.cos + 1j * preparation.rotation.sin)[:, None]
        return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)

    queries, keys = prepared(queries, preparation.queries), prepared(keys, preparation.keys)
    scores = jnp.einsum("bthd,bshd->bhts", queries, keys) / np.sqrt(queries.shape[-1])
    weights = jax.nn.softmax(jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf))
    kept = drop_weights(jnp.ones(weights.shape, jnp.float32), rate, dropout) > 0
    mixed = jnp.einsum("bhts,bshd->bthd", jnp.where(kept, weights / (1 - rate), 0), values)
    return mixed.reshape(*mixed.shape[:2], -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RAR", "AliTok"])
def test_fused_attention_of_bfloat16_is_as_good_as_the_plain_form(name):
    """Against float64: in the mean over output and gradients, and none much worse; but for the bias of the keys."""
    arguments, weights = problem(**PROBLEMS[name], dtype=jnp.bfloat16)
    fused = value_and_gradients(functools.partial(fused_on_mesh, interpret=True), arguments, weights)
    plain = value_and_gradients(plain_form, arguments, weights)
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda x: x.astype(jnp.float64), x) for x in (*arguments[:2], weights)]
        wanted = value_and_gradients(written_out, (*wide[:2], *arguments[2:]), wide[2])
    ours, theirs = ([distance(x, y) for x, y in zip(xs[:5], wanted[:5], strict=True)] for xs in (fused, plain))
    assert np.mean(ours) < np.mean(theirs)
    assert all(a < 1.2 * b + 1e-4 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(1, 4, 9, 16, 25, 36, 64), (155,), (100, 55)])
def test_fused_attention_of_blocks_sees_whole_blocks(blocks):
    """As VAR's scales do: a position sees its block and those before."""
    length, heads, size = 155, 8, 16
    (qkv, *_), weights = problem(length, size, heads)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    seen = owner[None, :] <= owner[:, None]

    def fused(qkv):
        return fused_attention(qkv.reshape(2, length, -1), Preparation(), heads, blocks=blocks, interpret=True)

    def wanted(qkv):
        queries, keys, values = jnp.moveaxis(qkv, 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", queries, keys) * size**-0.5
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, values).reshape(2, length, -1)

    for got, want in zip(*(jax.vjp(f, qkv)[1](weights) for f in (fused, wanted)), strict=True):
        assert distance(got, want) < 1e-5
    assert distance(fused(qkv), wanted(qkv)) < 1e-5


def gradient_of_layers(attention):
    """Of three layers in a scan, which are computed again going back."""
    (qkv, preparation, _, rate, dropout), weights = problem(40, 16, 8, norm="layer", rate=0.2)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
    def layer(x, place):
        mixed = attention(jnp.stack([x, 2 * x, -x], 2), preparation, None, rate, Dropout(place))
        return x + mixed.reshape(x.shape), None

    def loss(x):
        return jnp.sum(weights.reshape(x.shape) * jax.lax.scan(layer, x, dropout.split(3).words)[0])

    return jax.jit(jax.grad(loss))(qkv[:, :, 0])


@pytest.mark.slow
def test_fused_attention_under_scan_and_remat():
    fused = functools.partial(fused_on_mesh, interpret=True)
    assert distance(gradient_of_layers(fused), gradient_of_layers(plain_form)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_takes_fused_attention_and_needs_less_memory(monkeypatch):
    """reAR-B's heads in a scan on four chips, forward and backward, divided by rows and by heads, with dropout."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    heads = jax.ShapeDtypeStruct((64, 258, 16, 48), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def temporary(kernel: str, rate: float) -> tuple[int, int]:
        """Kernels in the program, and bytes that it needs besides its inputs."""

        def loss(x):
            def layer(x, given):
                w, words = given
                qkv = jnp.stack([w * x, x, x], 2)
                mixed = self_attention(qkv, Preparation(), kernel=kernel, rate=rate, dropout=Dropout(words))
                return x + mixed.reshape(x.shape), None

            layers = jnp.ones(6, x.dtype), Dropout.of(jax.random.key(0), jnp.arange(64)).split(6).words
            x, _ = jax.lax.scan(layer, x, layers)
            return x.astype(jnp.float32).sum()

        program = jax.jit(jax.grad(loss)).lower(heads).compile()
        return program.as_text().count("tpu_custom_call"), program.memory_analysis().temp_size_in_bytes

    with jax.set_mesh(mesh):
        kernels, fused = temporary("auto", 0.1)
        others, _ = temporary("splash", 0.0)
        none, unfused = temporary("plain", 0.1)
    assert (kernels, others, none) == (2, 3, 0)
    assert fused < unfused / 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chips", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("name", ["RAR", "AliTok", "AliTok in random orders", "LlamaGen of captions"])
def test_the_tpu_compiler_takes_fused_attention_of_every_family(monkeypatch, chips, name):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(chips, platform="tpu").devices[0]
    arguments, weights = problem(**PROBLEMS[name], dtype=jnp.bfloat16)
    qkv, preparation, visible, rate, dropout = arguments

    def gradients(qkv, preparation, visible, dropout, weights):
        def of(qkv, preparation):
            return fused_on_mesh(qkv, preparation, visible, rate, dropout)

        return jax.vjp(of, qkv, preparation)[1](weights)

    given = (qkv, preparation, visible, dropout, weights)
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
    assert jax.jit(gradients).lower(*shapes).compile().as_text().count("tpu_custom_call") == 1  # value is not asked for
