"""The mesh and its sharding rules; what needs eight devices is in `on_eight_devices.py`."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from rear_jax import generators, tokenizers
from rear_jax.errors import RearError
from rear_jax.runtime import divided, mesh, sharding
from rear_jax.tokenizers import discriminator
from rear_jax.training import objectives, vq
from rear_jax.training.state import adamw, new_state
from tests import toy, toy_sequence
from tests.test_configs import FILES, load

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}
KEPT = sharding.whole_frozen("reference", "generator")  # as in post-training
RAR = (KEPT, *generators.FAMILIES["rar"].parameters)
LLAMAGEN = (KEPT, *generators.FAMILIES["llamagen"].parameters)
VQGAN = (KEPT, *tokenizers.FAMILIES["maskgit_vqgan"].parameters)


def on_eight_devices(marker: str) -> None:
    """Runs the tests of that file with that marker in a process of their own, where programs compile fast."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marker, "tests/on_eight_devices.py"]
    environment = toy.environment(devices=8) | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
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
    ("rules", "path", "shape", "wanted"),
    [
        (RAR, "params/blocks/fc1/kernel", (24, 64, 192), (None, "fsdp", "tensor")),  # layers are never divided
        (RAR, "params/blocks/qkv/kernel", (24, 64, 192), (None, ("fsdp", "tensor"), None)),
        (RAR, "params/blocks/qkv/kernel", (24, 12, 36), (None, None, None)),  # 12 rows do not divide by 4 * 2
        (RAR, "opt_state/1/0/mu/blocks/fc2/kernel", (24, 192, 64), (None, "tensor", "fsdp")),
        (RAR, "ema/blocks/fc1/bias", (24, 192), (None, "tensor")),
        (RAR, "ema/blocks/qkv/bias", (24, 192), (None, None)),
        (RAR, "params/lm_head/kernel", (64, 1024), ("fsdp", "tensor")),
        (LLAMAGEN, "params/code_embeddings", (1024, 64), ("tensor", "fsdp")),
        (LLAMAGEN, "params/class_embeddings", (1001, 64), (None, "fsdp")),  # 1001 rows do not divide by 2
        (VQGAN, "params/tokenizer/decoder/up_0/block_0/conv1/kernel", (3, 3, 8, 16), (None, None, None, "fsdp")),
        (VQGAN, "params/tokenizer/decoder/conv_out/kernel", (3, 3, 8, 3), (None, None, None, None)),
        (VQGAN, "frozen/tokenizer/decoder/conv_in/kernel", (3, 3, 8, 16), (None, None, None, None)),
        (RAR, "frozen/reference/blocks/qkv/kernel", (24, 64, 192), (None, ("fsdp", "tensor"), None)),
        (RAR, "opt_state/1/0/count", (), ()),
    ],
)
def test_known_rules(rules, path, shape, wanted):
    assert sharding.spec(path, shape, SIZES, rules) == PartitionSpec(*wanted)


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("blocks/fc1/kernel", (24, 64, 192), (None, ("fsdp", "data"), "tensor")),  # the first dimension of its rule
        ("blocks/fc1/kernel", (24, 12, 192), (None, "fsdp", ("tensor", "data"))),  # 12 do not divide by 4 * 2: the next
        ("blocks/fc1/kernel", (24, 5, 3), (("data",), None, None)),  # none of them: another
        ("blocks/fc1/kernel", (3, 3, 3), (None, None, None)),
        ("blocks/qkv/kernel", (24, 64, 192), (None, ("fsdp", "tensor", "data"), None)),
        ("blocks/fc2/kernel", (24, 192, 64), (None, ("tensor", "data"), "fsdp")),
        ("blocks/norm1/scale", (24, 64), (None, ("data",))),  # no dimension has a rule: the last
        ("blocks/norm1/scale", (24, 63), (("data",), None)),
        ("embeddings", (1024, 64), (("tensor", "data"), "fsdp")),
        ("embeddings", (1026, 64), ("tensor", ("fsdp", "data"))),
        ("count", (), ()),
    ],
)
def test_state_is_divided_over_data_besides(path, shape, wanted):
    assert sharding.spec(f"params/{path}", shape, SIZES, RAR, divided.AXES) == PartitionSpec(*wanted)
    assert sharding.spec(path, shape, SIZES | {"data": 1}, RAR, divided.AXES) == sharding.spec(path, shape, SIZES, RAR)


def test_a_parameter_without_a_rule_is_named():
    path = "params/blocks/router/kernel"
    message = rf"no rule of sharding and weight decay fits {path}: add one to the `parameters` of its family"
    with pytest.raises(RearError, match=message):
        sharding.spec(path, (2, 8, 8), SIZES, LLAMAGEN)
    with pytest.raises(RearError, match=message):
        sharding.decay_mask({"params": {"blocks": {"router": {"kernel": jnp.zeros((2, 8, 8))}}}}, LLAMAGEN)


def test_a_parameter_of_fewer_dimensions_than_its_rule_is_named():
    with pytest.raises(RearError, match=r"rule of params/up/kernel \[8\] names 2 dimensions: mend its family"):
        sharding.spec("params/up/kernel", (8,), SIZES, LLAMAGEN)


def generator(name: str, method: str = "ar", **model):
    """Parameters' shapes of a generator of the toy tokenizer's codes whose widths the mesh divides, and its rules."""
    config = toy.config(method__name=method)
    config.unlock()
    family = generators.FAMILIES[name]
    config.model = family.section()
    config.model.update({"width": 64, "depth": 2, "heads": 2, "mlp_width": 96} | model)
    network = objectives.build_generator(config, tokenizers.build(config.tokenizer, config.data.image_size))
    return generators.shapes(network), family.parameters


def tokenizer(name: str, **changes):
    """Parameters' shapes of a tokenizer whose widths the mesh divides, and its rules."""
    family = tokenizers.FAMILIES[name]
    section = family.section()
    section.update({"codebook_size": 16, **changes})
    return tokenizers.shapes(tokenizers.build(section, 16)), family.parameters


GRID = {"channel_mult": (1, 2), "num_res_blocks": 1}
CONVOLUTION, VECTOR = (None, None, None, "fsdp"), (None,)
VIT = {  # of TiTok and AliTok
    "encoder/patch_embed/kernel": CONVOLUTION,
    "encoder/positional_embedding": (None, "fsdp"),
    "encoder/latent_tokens": (None, "fsdp"),
    "encoder/transformer/blocks/in_proj/kernel": (None, None, "fsdp"),
    "encoder/transformer/blocks/in_proj/bias": (None, None),
    "encoder/transformer/blocks/ln_1/scale": (None, None),
    "codebook": (None, None),
}
NETWORKS = {  # case -> (makes shapes and rules, how a few of its parameters are divided over SIZES)
    "generator rar": (
        lambda: generator("rar", "rear"),
        {
            "cls_token": (None, None, "fsdp"),
            "pos_embed": (None, None, "fsdp"),
            "embeddings": ("tensor", "fsdp"),
            "blocks/adaln/kernel": (None, "fsdp", "tensor"),
            "blocks/adaln/bias": (None, "tensor"),
            "blocks/proj/kernel": (None, "tensor", "fsdp"),
            "blocks/proj/bias": (None, None),
            "blocks/q_norm/scale": (None, None),
            "head_adaln/kernel": ("fsdp", "tensor"),
            "lm_head/bias": ("tensor",),
            "shallow_projector/layer0/kernel": ("fsdp", None),
            "deep_projector/layer2/bias": (None,),
        },
    ),
    "generator llamagen of classes": (
        lambda: generator("llamagen"),
        {
            "code_embeddings": ("tensor", "fsdp"),
            "class_embeddings": (None, "fsdp"),  # 11 rows
            "blocks/qkv/kernel": (None, ("fsdp", "tensor"), None),
            "blocks/gate/kernel": (None, "fsdp", "tensor"),
            "blocks/up/kernel": (None, "fsdp", "tensor"),
            "blocks/down/kernel": (None, "tensor", "fsdp"),
            "blocks/attention_norm/scale": (None, None),
            "norm/scale": (None,),
            "lm_head/kernel": ("fsdp", "tensor"),
        },
    ),
    "generator llamagen of captions": (
        lambda: generator("llamagen", condition="text", caption_length=3, caption_dim=8),
        {
            "null_caption": (None, "fsdp"),
            "caption_fc1/kernel": ("fsdp", "tensor"),
            "caption_fc2/kernel": ("tensor", "fsdp"),
        },
    ),
    "generator janus": (
        lambda: generator("janus", vocabulary_size=32, pad_id=1),
        {
            "token_embeddings": ("tensor", "fsdp"),
            "code_embeddings": (None, None),
            "aligner_fc1/kernel": ("fsdp", "tensor"),
            "aligner_fc2/kernel": ("tensor", "fsdp"),
            "aligner_fc2/bias": (None,),
            "blocks/qkv/kernel": (None, ("fsdp", "tensor"), None),
            "norm/scale": (None,),
            "head_fc1/kernel": ("fsdp", "tensor"),
            "head_fc2/kernel": ("fsdp", "tensor"),
            "head_fc2/bias": ("tensor",),
        },
    ),
    "generator alitok": (
        lambda: generator("alitok", "rear", prefix_tokens=7),
        {
            "embeddings": ("tensor", "fsdp"),
            "blocks/qkv/kernel": (None, ("fsdp", "tensor"), None),
            "blocks/k_norm/scale": (None, None),
            "blocks/mlp_norm/scale": (None, None),
            "lm_head/bias": ("tensor",),
            "shallow_projector/layer1/kernel": ("fsdp", None),
        },
    ),
    "generator alitok in any order": (
        lambda: generator("alitok", "rar", prefix_tokens=7, target_positions=True),
        {"target_aware_pos_embed": (None, "fsdp"), "blocks/gate/kernel": (None, "fsdp", "tensor")},
    ),
    "tokenizer maskgit_vqgan": (
        lambda: tokenizer("maskgit_vqgan", **GRID, hidden_channels=32),
        {
            "encoder/conv_in/kernel": CONVOLUTION,
            "encoder/down_1/block_0/nin_shortcut/kernel": CONVOLUTION,
            "encoder/norm_out/scale": VECTOR,
            "decoder/conv_in/bias": VECTOR,
            "decoder/conv_out/kernel": (None, None, None, None),  # 3 channels
            "codebook": (None, None),
        },
    ),
    "tokenizer vqgan_plus": (
        lambda: tokenizer("vqgan_plus", **GRID, hidden_channels=32),
        {
            "encoder/down_0/down_conv/kernel": CONVOLUTION,
            "decoder/up_0/upsample_conv/kernel": CONVOLUTION,
            "decoder/up_1/block_0/norm1/bias": VECTOR,
            "codebook": (None, None),
        },
    ),
    "tokenizer llamagen_vq": (
        lambda: tokenizer("llamagen_vq", **GRID, channels=32),
        {
            "encoder/conv_blocks_0/downsample/kernel": CONVOLUTION,
            "decoder/post_quant_conv/kernel": CONVOLUTION,
            "decoder/mid_1/q/kernel": CONVOLUTION,
            "decoder/mid_1/norm/scale": VECTOR,
            "decoder/conv_blocks_0/attn_0/proj_out/bias": VECTOR,
            "codebook": (None, None),
        },
    ),
    "tokenizer titok of codes": (
        lambda: tokenizer("titok", **toy_sequence.TITOK),
        VIT
        | {
            "decoder/trunk/mask_token": (None, None, "fsdp"),
            "decoder/trunk/class_embedding": (None, "fsdp"),
            "decoder/trunk/decoder_embed/kernel": (None, "fsdp"),
            "pixel_decoder/up_1/upsample_conv/kernel": CONVOLUTION,
            "pixel_decoder/up_2/block_0/norm1/scale": VECTOR,
            "pixel_codebook": (None, None),
        },
    ),
    "tokenizer titok of pixels": (
        lambda: tokenizer("titok", **toy_sequence.TITOK, predicts="pixels", legacy_reshape=False),
        VIT | {"decoder/ffn_0/kernel": CONVOLUTION, "decoder/conv_out/kernel": (None, None, None, None)},
    ),
    "tokenizer alitok": (
        lambda: tokenizer("alitok", **toy_sequence.ALITOK),
        VIT
        | {
            "decoder/class_embedding": (None, "fsdp"),
            "decoder/latent_token_positional_embedding": (None, "fsdp"),
            "decoder/transformer/blocks/out_proj/kernel": (None, None, "fsdp"),
        },
    ),
    "discriminator": (
        lambda: (
            {"discriminator": discriminator.shapes(discriminator.PatchDiscriminator(8, 2), 16)},
            discriminator.PARAMETERS,
        ),
        {
            "discriminator/Conv_0/kernel": CONVOLUTION,
            "discriminator/Conv_0/bias": VECTOR,
            "discriminator/GroupNorm_0/scale": VECTOR,
            "discriminator/Conv_3/kernel": (None, None, None, None),  # 1 channel
        },
    ),
}


@pytest.mark.parametrize(("kind", "families"), [("generator", generators.FAMILIES), ("tokenizer", tokenizers.FAMILIES)])
def test_every_family_is_among_these_networks(kind, families):
    assert {case.split(" ")[1] for case in NETWORKS if case.startswith(kind)} == set(families)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_rule(name):
    """Beside the known divisions every array has one. What decays is in `test_start.py`."""
    (shapes, rules), wanted = NETWORKS[name][0](), NETWORKS[name][1]
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        found[place] = sharding.spec(place, leaf.shape, SIZES, rules)
        # in a training state, with other networks beside it, the same holds
        for state in (f"params/{place}", f"params/tokenizer/{place}", f"opt_state/1/0/nu/{place}", f"ema/{place}"):
            assert sharding.spec(state, leaf.shape, SIZES, (KEPT, *rules)) == found[place]
    assert {place: tuple(found[place]) for place in wanted} == wanted


def networks_of(config) -> tuple:
    """What decides the names of a config's parameters."""
    return config.model.name, config.model.get("condition"), config.method.projector, config.tokenizer.name


def drawn(model):
    """Parameters of a generator, to be traced."""
    return model.init(jax.random.key(0), *generators.family_of(model).example_inputs(model))["params"]


CONFIGS = {networks_of(config): config for config in (load(file) for file in FILES)}


@pytest.mark.parametrize("names", CONFIGS)
def test_rules_cover_every_network(names):
    """Parameters, optimiser state and moving average of each generator, each tokenizer and the discriminator."""
    config = CONFIGS[names]
    config.model.update(width=64, heads=2)
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    model = objectives.build_generator(config, tokenizer)
    rules = generators.family_of(model).parameters

    def generator():
        return new_state(drawn(model), adamw(config.train.optimizer, 10, rules), ema=True)

    learning = vq.learning(config, vq.Networks(tokenizer, None, discriminator.PatchDiscriminator()), {}, {})
    for made, table in ((generator, rules), (lambda: learning.init({}), learning.rules)):
        shapes, devices = jax.eval_shape(made), AbstractMesh((1, 4, 1), mesh.AXES)
        whole = sharding.bytes_per_device(shapes, NamedSharding(devices, PartitionSpec()))
        assert sharding.bytes_per_device(shapes, sharding.shardings(shapes, devices, table)) < whole / 3


def test_a_model_of_three_billion_parameters_is_divided():
    """LlamaGen-3B with both moments of Adam, 37.2 GB: all but norms, and classes whose number is odd."""
    config = load(toy.ROOT / "configs" / "llamagen_3b_384.py")
    model = objectives.build_generator(config, tokenizers.build(config.tokenizer, config.data.image_size))
    assert (model.num_codes, model.codebook_size) == (576, 16384)
    rules = generators.family_of(model).parameters

    def generator():
        return new_state(drawn(model), adamw(config.train.optimizer, 10, rules))

    shapes = jax.eval_shape(generator)
    for shape, part in {(8, 1, 1): 1, (1, 8, 1): 8, (1, 1, 8): 8, (2, 2, 2): 4, (1, 8, 8): 64}.items():
        devices = AbstractMesh(shape, mesh.AXES)
        size = sharding.bytes_per_device(shapes, sharding.shardings(shapes, devices, rules))
        assert size == pytest.approx(3.0967e9 * 12 / part, rel=0.015)


def test_batches_that_do_not_divide_are_refused():
    mesh.check_batch({"data": -1, "fsdp": 1, "tensor": 1}, 6, 3, "config.x")
    with pytest.raises(RearError, match=r"config\.x = 6 does not divide over 4 microbatch"):
        mesh.check_batch({"data": -1, "fsdp": 1, "tensor": 1}, 6, 4, "config.x")


def test_fetching_a_host_array_is_that_array():
    assert mesh.fetch(jnp.arange(3)).tolist() == [0, 1, 2]
