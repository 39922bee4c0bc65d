"""What needs eight devices; `test_mesh.py` runs it in a process that has them."""

import functools
import itertools
import math
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rear_jax import generators
from rear_jax.config import loop_settings
from rear_jax.generators.attention import self_attention
from rear_jax.generators.attention_kernels import flash_on_mesh, fused_on_mesh, splash_attention
from rear_jax.generators.dropout import Dropout
from rear_jax.generators.heads import Norm, Preparation, Rotation
from rear_jax.plan import hlo
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.mesh import AXES, make_mesh, map_rows, put_batch, replicated, split
from rear_jax.runtime.precision import Linear
from rear_jax.runtime.sharding import bytes_per_device, shardings, whole_frozen
from rear_jax.runtime.writer import read_metrics
from rear_jax.sampling.generate import Sampler, generate
from rear_jax.text import t5
from rear_jax.text.encoder import right_aligned
from rear_jax.training import loop, objectives
from rear_jax.training.posttraining import va_pi
from rear_jax.training.posttraining.teacher_forcing import Networks
from rear_jax.training.state import new_state
from tests import test_modulated, toy

KEY = jax.random.key(3)
OPTIMIZER = optax.sgd(0.1, momentum=0.9)  # unlike Adam, it does not blow rounding up where gradients vanish
MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (1, 8, 1),
    "tensor": (1, 1, 8),
    "all": (2, 2, 2),
}
CONFIGS = {
    "ar": lambda: toy.llamagen_config(dropout=0.0, token_dropout=0.0),  # what compiles fastest
    "rear": lambda: toy.config(train__ema_decay=0.5),
    "va_pi": lambda: toy.config(method__name="ar", posttrain__reward__perceptual=0.0),
}
CASES = [
    ("ar", "all"),
    *(pytest.param("rear", mesh, marks=pytest.mark.slow) for mesh in ("data", "fsdp", "tensor", "all")),
    *(pytest.param("va_pi", mesh, marks=pytest.mark.slow) for mesh in ("data", "all")),  # of the same layers
]


def mesh_of(name: str) -> jax.sharding.Mesh:
    sizes = MESHES[name]
    return make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])


def build(config):
    """Tokenizer, generator and a batch of the toy experiment; parameters that no zero makes blind."""
    tokenizer, model = toy.tokenizer(config), toy.generator(config)
    frozen = {
        "tokenizer": jax.jit(tokenizer.init)(KEY, jnp.zeros((1, 32, 32, 3)))["params"],
        "codebook": jax.random.normal(KEY, (16, tokenizer.embedding_dim)),
    }
    codes = np.asarray(jax.random.randint(KEY, (8, model.num_codes), 0, 16))
    images = np.asarray(jax.random.randint(KEY, (8, 32, 32, 3), 0, 256).astype(jnp.uint8))
    labels = np.arange(8, dtype=np.int32)
    batch = {"codes": codes, "image": images, "label": labels, "condition": labels, "index": labels}

    def init(given):
        params = model.init(KEY, *generators.family_of(model).example_inputs(model))["params"]
        params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        return new_state(params, OPTIMIZER, ema=config.train.ema_decay > 0)

    return tokenizer, model, frozen, batch, init


def train(method, workdir, mesh, *, steps=2, **changes):
    """The last state, and the metrics of every step, out of the training loop."""
    learning, batch = learn(method, steps, **changes)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=2)
    run = loop.Run(lambda start: (batch for _ in itertools.count(start)), mesh, {}, checkpoints, workdir)
    state = loop.train(learning, run)
    checkpoints.close()
    return state, read_metrics(workdir, "job")


def learn(method, steps=2, *, divides=True, dtype="float32", accumulation=1):
    """What such a job computes, and its batch."""
    config = CONFIGS[method]()
    config.model.dtype, config.train.accumulation, config.posttrain.accumulation = dtype, accumulation, accumulation
    tokenizer, model, frozen, batch, init = build(config)
    if method == "va_pi":
        step_fn = va_pi.METHOD.make_step(Networks(model, tokenizer), config, OPTIMIZER)
    else:
        step_fn = objectives.train_step(model, config, OPTIMIZER)

    settings = loop_settings()
    settings.update({"steps": steps, "batch_size": 8, "log_every": 1, "checkpoint_every": 2, "picture_every": 0})
    learning = loop.Learning(
        job="job",
        step=step_fn,
        init=init,
        given={},
        frozen=frozen,
        batch=jax.eval_shape(lambda: batch),
        rules=(whole_frozen(), *generators.family_of(model).parameters),
        settings=settings,
        seed=3,
        divides=divides,
        dtype=model.dtype,
    )
    return learning, batch


def assert_same(one, other):
    """The same states and metrics to float32 rounding; what only counts random choices, exactly."""
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-6)
    for a, b in zip(one[1], other[1], strict=True):
        assert a.get("noise") == b.get("noise")
        for name in a.keys() - {"job", "steps_per_second", "images_per_second", "device_hours", "input_wait"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """What each method gives on one device, after two steps and after four."""
    return functools.cache(
        lambda method, steps: train(method, tmp_path_factory.mktemp(method), mesh_of("one"), steps=steps)
    )


@pytest.mark.parametrize(("method", "mesh"), CASES)
def test_a_step_is_the_same_on_every_mesh(tmp_path, on_one, method, mesh):
    made = train(method, tmp_path, mesh_of(mesh))
    assert_same(on_one(method, 2), made)
    if mesh == "all":
        for tree, part in ((made[0].params, (2, 4, 48)), (made[0].opt_state[0].trace, (2, 2, 48))):
            kernel = tree["blocks"]["qkv"]["kernel"]  # parameters are whole for whoever looks at them
            assert kernel.shape == (2, 16, 48)
            assert {shard.data.shape for shard in kernel.addressable_shards} == {part}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_device_keeps_and_updates_a_part_of_the_state(tmp_path, accumulation):
    """Of parameters, moments and moving average; numbers are those of a state that is not divided, bit for bit in what
    is rounded to bfloat16. No dimension of a few small arrays divides."""
    learning, _ = learn("rear", accumulation=accumulation)
    mesh, wanted = mesh_of("data"), learning.state(mesh_of("data"))
    whole, part = (
        bytes_per_device(wanted, place)
        for place in (replicated(mesh), jax.tree.map(lambda leaf: leaf.sharding, wanted))
    )
    assert whole / 8 < part < 1.05 * whole / 8
    made = [
        train("rear", tmp_path / str(divides), mesh, divides=divides, dtype="bfloat16", accumulation=accumulation)
        for divides in (True, False)
    ]
    assert_same(*made)
    moments = made[0][0].opt_state[0].trace
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float32")}
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(moments))
    assert held < 1.05 * sum(leaf.nbytes for leaf in jax.tree.leaves(moments)) / 8


def test_gradients_of_bfloat16_layers_are_float32_sums_over_devices():
    """Kernel and bias of a layer against sums in float64; added up in bfloat16 they are a thousandth off and more."""
    layer, mesh = Linear(8, jnp.bfloat16), mesh_of("data")
    x, weights = (jax.random.normal(jax.random.key(i), (4096, 8)).astype(jnp.bfloat16) for i in range(2))
    params = layer.init(KEY, x)["params"]

    @jax.jit
    def gradients(params, x, weights):
        loss = lambda params: jnp.sum((layer.apply({"params": params}, x) * weights).astype(jnp.float32))  # noqa: E731
        return jax.grad(loss)(params)

    with jax.set_mesh(mesh):
        found = gradients(params, *jax.device_put((x, weights), split(mesh)))
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    for name, wanted in {"kernel": x.T @ weights, "bias": weights.sum(0)}.items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max())


def test_rows_are_mapped_where_they_lie():
    def function(row):
        return jnp.sin(row["x"]) + row["y"].sum()

    rows = {"x": np.arange(16.0, dtype=np.float32), "y": np.ones((16, 3), np.float32)}
    mesh = mesh_of("data")
    with jax.set_mesh(mesh):
        program = jax.jit(lambda rows: map_rows(function, rows, at_once=1)).lower(put_batch(rows, mesh)).compile()
        np.testing.assert_allclose(program(put_batch(rows, mesh)), np.sin(rows["x"]) + 3.0, rtol=1e-6)
    assert "all-gather" not in program.as_text()


@pytest.mark.parametrize("count", [1, 6, 9])
def test_rows_that_do_not_divide_over_the_devices_are_mapped(count):
    rows = np.arange(float(count), dtype=np.float32)
    with jax.set_mesh(mesh_of("data")):
        mapped = jax.jit(lambda rows: map_rows(jnp.sin, rows, at_once=2))(rows)
    np.testing.assert_allclose(mapped, np.sin(rows), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 1])  # one row, as a model's `init` has it, divides over nothing
def test_splash_attention_is_divided_over_the_mesh(rows):
    """Rows over 'data' and 'fsdp', heads over 'tensor': outputs and gradients of the plain form, and no exchange."""
    inputs = [jax.random.normal(jax.random.key(i), (rows, 5, 4, 8)) for i in range(3)]

    def of(attention):
        return jax.value_and_grad(lambda *qkv: jnp.sum(jnp.sin(attention(*qkv))), argnums=(0, 1, 2))

    spec = PartitionSpec(("data", "fsdp"), None, "tensor") if rows == 8 else PartitionSpec(None, None, "tensor")
    with jax.set_mesh(mesh_of("all")):
        placed = jax.device_put(inputs, NamedSharding(mesh_of("all"), spec))
        program = jax.jit(of(functools.partial(splash_attention, interpret=True))).lower(*placed).compile()
        got = program(*placed)

    def plain(*qkv):
        return self_attention(jnp.stack(qkv, 2), Preparation(), kernel="plain").reshape(qkv[0].shape)

    wanted = of(plain)(*inputs)
    chex.assert_trees_all_close(got, wanted, atol=1e-4)
    assert {gradient.sharding.spec for gradient in got[1]} == {spec}
    assert "all-gather" not in program.as_text()


def test_sampling_gathers_divided_weights_once():
    """The codes that one device draws. In the loop devices send nothing."""
    _, model, _, _, init = build(toy.llamagen_config())
    family, params = generators.family_of(model), init({}).params
    cached, sampler = generators.cached(model), Sampler()
    labels = rows = jnp.arange(8)

    @jax.jit
    def draw(params, labels, rows, keys):
        return generate(cached, params, labels, rows, keys, sampler)

    given = labels, rows, jax.random.split(KEY, 8)
    wanted, mesh = draw(params, *given), mesh_of("fsdp")
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(params, mesh, family.parameters))
        divided = (given[0], *jax.device_put(given[1:], split(mesh)))
        program = draw.lower(placed, *divided).compile()
        codes = program(placed, *divided)
    np.testing.assert_array_equal(codes, wanted)
    sent = hlo.collectives(hlo.parse(program.as_text()))
    assert {one.kind for one in sent} == {"all-gather"}
    assert {one.times for one in sent} == {1}


@pytest.mark.parametrize("axis", ["fsdp", "tensor", "all"])
def test_a_text_encoder_is_divided_over_the_mesh(axis):
    """Under 'fsdp' each block gathers its seven kernels and nothing else; under 'tensor' it adds up two products."""
    sizes = {"vocabulary_size": 64, "width": 32, "depth": 2, "heads": 8, "head_size": 4, "mlp_width": 64}
    module = t5.T5Encoder(**sizes, dtype=jnp.dtype("float32"))
    mask = np.arange(6) < np.array([6, 3, 1, 5, 2, 4, 6, 1])[:, None]
    ids = np.where(mask, np.arange(48).reshape(8, 6), 0).astype(np.int32)
    params = jax.jit(module.init)(KEY, ids, mask)["params"]
    encode = jax.jit(lambda params, ids, mask: right_aligned(module.apply({"params": params}, ids, mask), mask))
    wanted, mesh = encode(params, ids, mask), mesh_of(axis)
    with jax.set_mesh(mesh):
        places = shardings(params, mesh, t5.PARAMETERS)
        given = jax.device_put(params, places), *jax.device_put((ids, mask), split(mesh))
        program = encode.lower(*given).compile()
        found = program(*given)
    chex.assert_trees_all_close(found, wanted, atol=1e-5)
    assert bytes_per_device(params, places) < 0.3 * bytes_per_device(params, replicated(mesh))
    in_blocks = [one.kind for one in hlo.collectives(hlo.parse(program.as_text())) if one.times == module.depth]
    kinds = {"fsdp": ["all-gather"] * 7, "tensor": ["all-reduce"] * 2, "all": ["all-gather"] * 7 + ["all-reduce"] * 2}
    assert sorted(in_blocks) == kinds[axis]


@pytest.mark.parametrize("rows", [8, 6])
def test_what_is_between_products_is_divided_by_rows(rows):
    """As the plain form on one device; gradients of norms are sums over devices, and nothing else is sent."""
    given = test_modulated.inputs(5, 128, rows=rows)
    wanted = test_modulated.value_and_gradients(test_modulated.PLAIN, 0.2, given)
    spec = PartitionSpec(("data", "fsdp")) if rows == 8 else PartitionSpec()

    def fused(*given):
        return test_modulated.value_and_gradients(test_modulated.INTERPRETED, 0.2, given)

    with jax.set_mesh(mesh_of("all")):
        placed = [
            jax.device_put(x, NamedSharding(mesh_of("all"), spec if x.ndim == 3 else PartitionSpec())) for x in given
        ]
        program = jax.jit(fused).lower(*placed).compile()
        got = program(*placed)
    for name, want in wanted.items():
        np.testing.assert_allclose(got[name], want, atol=1e-5 * float(jnp.abs(want).max()), err_msg=name)
    assert "all-gather" not in program.as_text()
    assert ("all-reduce" in program.as_text()) == (rows == 8)


@pytest.mark.parametrize("kernel", [fused_on_mesh, flash_on_mesh])
@pytest.mark.parametrize(("rows", "turned"), [(8, 8), (6, 6), (8, 1)])
def test_our_attention_is_divided_over_the_mesh(rows, turned, kernel):
    """Outputs and gradients of the plain form on one device, with its mask of dropout, and no exchange of heads."""
    qkv = jax.random.normal(jax.random.key(0), (rows, 5, 3, 4, 8))
    norms = [Norm(*jax.random.normal(jax.random.key(1 + i), (2, 8))) for i in range(2)]
    angles = jax.random.normal(jax.random.key(3), (turned, 5, 4))  # of each image, or of all alike
    rotation, visible = (
        Rotation(jnp.cos(angles), jnp.sin(angles)),
        jax.random.bernoulli(jax.random.key(4), 0.5, (rows, 5)),
    )
    dropout = Dropout.of(jax.random.key(5), jnp.arange(rows))

    def of(attention):
        def loss(qkv, *norms):
            return jnp.sum(jnp.sin(attention(qkv, Preparation(*norms, rotation), visible, 0.2, dropout)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2))

    def plain(qkv, preparation, visible, rate, dropout):
        return self_attention(qkv, preparation, kernel="plain", visible=visible, rate=rate, dropout=dropout)

    heads = (None, None, "tensor")
    spec = PartitionSpec(("data", "fsdp"), *heads) if rows == 8 else PartitionSpec(None, *heads)
    with jax.set_mesh(mesh_of("all")):
        placed = jax.device_put(qkv, NamedSharding(mesh_of("all"), spec))
        program = jax.jit(of(functools.partial(kernel, interpret=True))).lower(placed, *norms).compile()
        got = program(placed, *norms)
    wanted = of(plain)(qkv, *norms)
    chex.assert_trees_all_close(got, wanted, atol=1e-4)
    assert got[1][0].sharding.spec == spec
    assert "all-gather" not in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize("divides", [True, False])
def test_a_checkpoint_is_read_on_any_mesh(tmp_path, on_one, divides):
    """Two steps on one mesh, and from there on two others, with the state divided over 'data' and without."""
    train("rear", tmp_path / "all", mesh_of("data"), divides=divides)
    shutil.copytree(tmp_path / "all", tmp_path / "one")
    for name in ("one", "all"):
        assert_same(on_one("rear", 4), train("rear", tmp_path / name, mesh_of(name), steps=4, divides=not divides))
