"""The mesh and its sharding rules; what needs eight devices is in `on_eight_devices.py`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rear_jax import models, tokenizers
from rear_jax.errors import RearError
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import mesh, sharding, vq
from rear_jax.training.state import adamw, new_state
from tests import toy
from tests.test_configs import FILES, load

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


def on_eight_devices(marker: str) -> None:
    """Runs the tests of that file with that marker in a process of their own, where programs compile fast."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marker, "tests/on_eight_devices.py"]
    environment = toy.environment(devices=8)
    done = subprocess.run(command, env=environment, cwd=toy.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_on_eight_devices():
    on_eight_devices("not slow")


@pytest.mark.slow
def test_more_on_eight_devices():
    on_eight_devices("slow")


@pytest.mark.parametrize(
    ("sizes", "count", "shape"),
    [((-1, 1, 1), 8, (8, 1, 1)), ((1, -1, 2), 8, (1, 4, 2)), ((2, 2, 2), 8, (2, 2, 2)), ((-1, 1, 1), 1, (1, 1, 1))],
)
def test_one_axis_takes_the_rest(sizes, count, shape):
    assert tuple(mesh.mesh_shape(dict(zip(mesh.AXES, sizes, strict=True)), count).values()) == shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, -1, 1), (-2, 1, 1), (16, 1, 1)])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(RearError, match=r"config\.mesh \(data = .* does not fit 8 device"):
        mesh.mesh_shape(dict(zip(mesh.AXES, sizes, strict=True)), 8)


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("params/blocks/fc1/kernel", (24, 64, 192), (None, "fsdp", "tensor")),  # layers are never divided
        ("params/blocks/qkv/kernel", (24, 64, 192), (None, ("fsdp", "tensor"), None)),
        ("params/blocks/qkv/kernel", (24, 12, 36), (None, None, None)),  # 12 rows do not divide by 4 * 2
        ("opt_state/1/0/mu/blocks/fc2/kernel", (24, 192, 64), (None, "tensor", "fsdp")),
        ("ema/blocks/fc1/bias", (24, 192), (None, "tensor")),
        ("ema/blocks/qkv/bias", (24, 192), (None, None)),
        ("params/lm_head/kernel", (64, 1024), ("fsdp", "tensor")),
        ("params/code_embeddings", (1024, 64), ("tensor", "fsdp")),
        ("params/class_embeddings", (1001, 64), (None, "fsdp")),  # 1001 rows do not divide by 2
        ("params/tokenizer/decoder/up_0/block_0/conv1/kernel", (3, 3, 8, 16), (None, None, None, "fsdp")),
        ("params/tokenizer/decoder/conv_out/kernel", (3, 3, 8, 3), (None, None, None, None)),
        ("frozen/tokenizer/decoder/conv_in/kernel", (3, 3, 8, 16), (None, None, None, None)),
        ("frozen/reference/blocks/qkv/kernel", (24, 64, 192), (None, ("fsdp", "tensor"), None)),
        ("opt_state/1/0/count", (), ()),
    ],
)
def test_known_rules(path, shape, wanted):
    assert sharding.spec(path, shape, SIZES) == PartitionSpec(*wanted)


@pytest.mark.parametrize(("path", "shape"), [("params/blocks/router/kernel", (2, 8, 8)), ("params/up/kernel", (8,))])
def test_a_parameter_without_a_rule_is_named(path, shape):
    with pytest.raises(RearError, match=f"no sharding rule fits {path}"):
        sharding.spec(path, shape, SIZES)


def networks_of(config) -> tuple:
    """What decides the names of a config's parameters."""
    return config.model.name, config.model.get("condition"), config.method.projector, config.tokenizer.name


CONFIGS = {networks_of(config): config for config in (load(file) for file in FILES)}


@pytest.mark.parametrize("names", CONFIGS)
def test_rules_cover_every_network(names):
    """Parameters, optimiser state and moving average of each generator, each tokenizer and the discriminator."""
    config = CONFIGS[names]
    config.model.update(width=64, heads=2)
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    model = models.build(config, num_codes=tokenizer.codes_per_image, embedding_dim=tokenizer.embedding_dim)

    def generator():
        params = model.init(jax.random.key(0), *models.example_inputs(model))["params"]
        return new_state(params, adamw(config.train.optimizer, 10), ema=True)

    networks = vq.Networks(tokenizer, None, PatchDiscriminator())
    for made in (generator, lambda: vq.init_state(networks, config, vq.make_optimizer(config), {})):
        shapes, devices = jax.eval_shape(made), AbstractMesh((1, 4, 1), mesh.AXES)
        whole = sharding.bytes_per_device(shapes, NamedSharding(devices, PartitionSpec()))
        assert sharding.bytes_per_device(shapes, sharding.shardings(shapes, devices)) < whole / 3


def test_a_model_of_three_billion_parameters_is_divided():
    """LlamaGen-3B with both moments of Adam, 37.2 GB: all but norms, and classes whose number is odd."""
    config = load(toy.ROOT / "configs" / "llamagen_3b_384.py")
    model = models.build(config, num_codes=576, embedding_dim=8)

    def generator():
        params = model.init(jax.random.key(0), *models.example_inputs(model))["params"]
        return new_state(params, adamw(config.train.optimizer, 10))

    shapes = jax.eval_shape(generator)
    for shape, part in {(8, 1, 1): 1, (1, 8, 1): 8, (1, 1, 8): 8, (2, 2, 2): 4, (1, 8, 8): 64}.items():
        devices = AbstractMesh(shape, mesh.AXES)
        size = sharding.bytes_per_device(shapes, sharding.shardings(shapes, devices))
        assert size == pytest.approx(3.0967e9 * 12 / part, rel=0.015)


def test_batches_that_do_not_divide_are_refused():
    mesh.check_batch({"data": -1, "fsdp": 1, "tensor": 1}, 6, 3, "config.x")
    with pytest.raises(RearError, match=r"config\.x = 6 does not divide over 4 microbatch"):
        mesh.check_batch({"data": -1, "fsdp": 1, "tensor": 1}, 6, 4, "config.x")


def test_fetching_a_host_array_is_that_array():
    assert mesh.fetch(jnp.arange(3)).tolist() == [0, 1, 2]
