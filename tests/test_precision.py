"""In what precision networks multiply and add up, on every backend: read from what JAX traces and lowers."""

import functools
import importlib.util
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from rear_jax import artifacts, generators, tokenizers
from rear_jax.errors import RearError
from rear_jax.generators.dropout import Dropout, drop
from rear_jax.generators.layers import HeadsLinear
from rear_jax.metrics import efficientnet, inception, lpips, perceptual
from rear_jax.metrics.features import efficientnet_features
from rear_jax.plan import chips, roofline
from rear_jax.runtime import flops
from rear_jax.runtime.mesh import make_mesh
from rear_jax.runtime.precision import (
    Linear,
    Prepared,
    gelu,
    in_float32,
    multiply,
    of_products,
    products_at,
    standing_in_for,
)
from rear_jax.sampling import draw
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from tests import toy, toy_sequence

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
TOKENIZERS = {  # sections of every family, for images of 16 pixels
    "maskgit_vqgan": {"hidden_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8},
    "vqgan_plus": {"hidden_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8},
    "llamagen_vq": {"channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "z_channels": 8},
    "titok": toy_sequence.TITOK,
    "alitok": toy_sequence.ALITOK,
}


def kinds(function, *arguments) -> set[str]:
    """Of all products in a function and its gradient by the first argument, see `flops.by_precision`."""
    forward = flops.by_precision(jax.make_jaxpr(function)(*arguments))

    def scalar(*arguments):
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(function(*arguments)))

    return set(forward + flops.by_precision(jax.make_jaxpr(jax.grad(scalar))(*arguments)))


def tokenizer_of(name: str, **changes):
    section = tokenizers.FAMILIES[name].section()
    section.update(TOKENIZERS[name] | {"codebook_size": 16} | changes)
    return tokenizers.build(section, 16)


def test_every_family_is_looked_at():
    assert set(TOKENIZERS) == set(tokenizers.FAMILIES)


@pytest.mark.parametrize("wanted", ["high", "highest"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_float32_tokenizer_names_the_precision_of_every_product(name, wanted):
    """The search of the nearest code is at 'highest' in any case."""
    network = tokenizer_of(name, dtype="float32", precision=wanted)
    params, codes = tokenizers.shapes(network), jax.ShapeDtypeStruct((2, network.codes_per_image), jnp.int32)

    def call(method):
        return lambda params, x: network.apply({"params": params}, x, method=method)

    assert kinds(call("latents"), params, IMAGES) == {wanted}
    assert kinds(call("decode"), params, codes) == {wanted}
    assert kinds(call("__call__"), params, IMAGES) == {wanted, "highest"}
    encode = jax.make_jaxpr(call("encode"))(params, IMAGES)
    assert set(flops.by_precision(encode)) == {wanted, "highest"}


def test_an_unknown_precision_is_refused():
    with pytest.raises(RearError, match=r"config\.tokenizer\.precision = 'default': use high or highest\."):
        tokenizer_of("maskgit_vqgan", precision="default")


@pytest.mark.parametrize(("dtype", "wanted"), [("float32", {"high"}), ("bfloat16", {"bfloat16"})])
@pytest.mark.parametrize("name", ["rar", "llamagen", "alitok", "janus"])
def test_every_product_of_a_generator(name, dtype, wanted):
    """Training, and sampling with its decoder; reAR's projectors are there."""
    tapped = name in ("rar", "alitok")
    config = toy.config(method__name="rear" if tapped else "ar")
    config.unlock()
    config.model = generators.FAMILIES[name].section()
    config.model.update(width=32, depth=2, heads=2, mlp_width=48, dtype=dtype)
    if name == "alitok":
        config.model.prefix_tokens = 0
    if name == "janus":
        config.model.update(vocabulary_size=32, prompt_length=4, pad_id=3)
    tokenizer = artifacts.outline_tokenizer(config)
    network = generators.build(config, tokenizer.module, needs=("taps",) if tapped else ())
    params, inputs = generators.shapes(network), generators.family_of(network).example_inputs(network)

    def train(params):
        out = network.apply({"params": params}, *inputs, dropout=Dropout.of(jax.random.key(0), jnp.arange(1)))
        return [leaf for leaf in out if leaf is not None]

    config.sample.guidance_scale = 2.0
    program = draw.compile_sampler(config, network, tokenizer.module)
    rows = jnp.zeros(2, jnp.int32)
    with standing_in_for("gpu"):  # a CPU gets some factors in float32
        assert kinds(train, params) == wanted
        traced = program.trace(params, tokenizer.params, inputs[1], rows, rows).jaxpr
    assert set(flops.by_precision(traced)) == wanted | {"high"}  # the tokenizer is float32


@pytest.mark.slow
def test_a_plan_counts_what_its_chips_will_multiply_not_what_stands_in_for_them():
    topology = chips.topology("h100:8")
    made = toy.config(model__dtype="bfloat16", train__loop__batch_size=8)
    mesh = make_mesh(made.mesh, topology.devices)
    assert set(roofline._operations(made, "train", topology, mesh)) == {"bfloat16"}


@pytest.mark.slow
def test_losses_and_rewards_are_at_high_and_scores_at_highest():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for name in perceptual.NETWORKS:
        network = perceptual.outline(name, option="config.x")
        assert kinds(lambda a, b, p, of=network: of.distance(p, a, b), images, images, network.params) == {"high"}
    scored = lpips.LPIPS()
    params = jax.eval_shape(scored.init, jax.random.key(0), images, images)["params"]
    assert kinds(lambda a, b, p: scored.apply({"params": p}, a, b), images, images, params) == {"highest"}
    params = jax.eval_shape(efficientnet.EfficientNetLite("lite0").init, jax.random.key(0), images)["params"]
    extract = functools.partial(efficientnet_features, variant="lite0", size=32)
    assert set(flops.by_precision(jax.make_jaxpr(extract)(params, images))) == {"highest"}


def test_the_discriminator_is_at_high():
    network, images = PatchDiscriminator(8, 2), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    assert kinds(lambda p, x: network.apply({"params": p}, x), params, images) == {"high"}


def test_inception_is_at_highest():
    network, images = inception.InceptionV3(), jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    traced = jax.make_jaxpr(lambda p, x: network.apply({"params": p}, x))(params, images)
    assert set(flops.by_precision(traced)) == {"highest"}


def test_the_programs_for_tpus_say_so():
    """Lowered for a TPU, without its compiler: no product of float32 is left to the default."""
    network = tokenizer_of("llamagen_vq")
    params = tokenizers.shapes(network)
    for method, x in {"encode": IMAGES, "decode": jax.ShapeDtypeStruct((2, 64), jnp.int32)}.items():
        jitted = jax.jit(lambda params, x, method=method: network.apply({"params": params}, x, method=method))
        text = jitted.trace(params, x).lower(lowering_platforms=("tpu",)).as_text()
        products = [line for line in text.splitlines() if "stablehlo.convolution" in line or ".dot_general" in line]
        assert len(products) > 10
        assert not [line for line in products if not re.search(r"HIGH(EST)?", line)]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_makes_float32_products_in_passes(monkeypatch):
    """What the compiler of a v5e leaves of a frozen tokenizer: every product of float32 names its precision."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"chip_config_name": "default", "chips_per_host_bounds": (1, 1, 1)}
    device = topologies.get_topology_desc("v5e:1x1", platform="tpu", **options).devices[0]
    network = tokenizer_of("maskgit_vqgan", hidden_channels=128, z_channels=256)
    place = jax.sharding.SingleDeviceSharding(device)
    codes = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    params, images, codes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (tokenizers.shapes(network), IMAGES, codes)
    )
    for method, x in {"encode": images, "decode": codes}.items():
        jitted = jax.jit(lambda params, x, method=method: network.apply({"params": params}, x, method=method))
        text = jitted.lower(params, x).compile().as_text()
        products = [line for line in text.splitlines() if re.search(r" = f32\S* convolution\(", line)]
        assert products
        assert not [line for line in products if not re.search(r"operand_precision=\{high", line)]


class TestProducts:
    """`multiply` and what is built of it."""

    def test_the_gradient_of_a_kernel_is_a_float32_sum(self):
        """A plain bfloat16 product rounds each sum to 8 bits: 1e-3 and more off; here what is left is float32's."""
        x, g = (jax.random.normal(jax.random.key(i), (512, 8)).astype(jnp.bfloat16) for i in range(2))
        kernel = jax.random.normal(jax.random.key(2), (8, 8))
        _, pull_back = jax.vjp(lambda kernel: multiply(x, kernel, jnp.bfloat16), kernel)
        (found,) = pull_back(g)
        assert found.dtype == jnp.float32
        wanted = np.asarray(x, np.float64).T @ np.asarray(g, np.float64)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_value_and_gradients_are_those_of_a_plain_product(self, dtype):
        shapes = (32, 16), (16, 3, 8), (32, 3, 8)
        x, kernel, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
        value, pull_back = jax.vjp(lambda x, kernel: multiply(x, kernel, dtype, out_dtype=jnp.float32), x, kernel)
        plain, plain_back = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, 1), x, kernel)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.02, "atol": 0.1}
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, plain, **tolerance)
        for found, wanted in zip(pull_back(g), plain_back(g), strict=True):
            np.testing.assert_allclose(found, wanted, **tolerance)

    @pytest.mark.parametrize("layer", [Linear(12, jnp.bfloat16), HeadsLinear(2, jnp.bfloat16)], ids=["linear", "heads"])
    def test_a_prepared_kernel_is_as_good_as_one_that_is_rounded_in_the_layer(self, layer):
        """Value and gradients are the same to the last bit; the gradient is float32, of the stored kernel alone."""
        x = jax.random.normal(jax.random.key(0), (6, 4))
        params = layer.init(jax.random.key(1), x)["params"]
        rounded = params["kernel"].astype(jnp.bfloat16)

        def loss(params, x):
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x).astype(jnp.float32)))

        def prepared(params, x):
            kernel = Prepared(params["kernel"], rounded, ())
            return loss(params | {"kernel": kernel}, x)

        wanted, found = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (loss, prepared))
        chex.assert_trees_all_equal(found, wanted)
        assert found[1][0]["kernel"].dtype == jnp.float32
        nothing = jax.grad(lambda factor: loss(params | {"kernel": Prepared(params["kernel"], factor, ())}, x))(rounded)
        assert not nothing.any()
        unread = {"kernel": Prepared(jnp.full((4, 12), jnp.nan), rounded, ())}
        np.testing.assert_array_equal(loss(params | unread, x), wanted[0])

    def test_layers_in_a_scan_read_the_prepared_stack_backwards_too(self):
        """It is not written once more, a layer at a time, to be kept for the backward pass."""
        kernels, layer = jnp.ones((3, 5, 5)), Linear(5, jnp.bfloat16, use_bias=False)

        def loss(kernels, rounded):
            def body(x, kernel):
                return jnp.sin(layer.apply({"params": {"kernel": kernel}}, x)), None

            stack = Prepared(kernels, rounded, ())
            return jnp.sum(jax.lax.scan(body, jnp.ones((2, 5), jnp.bfloat16), stack)[0].astype(jnp.float32))

        traced = jax.make_jaxpr(jax.grad(loss))(kernels, kernels.astype(jnp.bfloat16))
        forward, backward = [one for one in traced.eqns if one.primitive.name == "scan"]
        made = [(out.aval.dtype, out.aval.shape) for scan in (forward, backward) for out in scan.outvars]
        assert [dtype for dtype, shape in made if shape == (3, 5, 5)] == [jnp.float32]  # the gradient

    def test_a_bias_is_added_and_its_gradient_summed_in_float32(self):
        layer, x = Linear(4, jnp.bfloat16), jnp.ones((1000, 3), jnp.bfloat16)
        params = layer.init(jax.random.key(0), x)
        gradients = jax.grad(lambda p: layer.apply(p, x).astype(jnp.float32).sum())(params)
        assert (gradients["params"]["bias"] == 1000).all()  # bfloat16 would count to 256 and no further

    def test_a_window_is_the_form_of_a_convolution_s_kernel(self):
        x = jax.random.normal(jax.random.key(0), (2, 5, 12))
        layer = Linear(4, window=(2, 2))
        kernel = layer.init(jax.random.key(1), x)["params"]["kernel"]
        assert kernel.shape == (2, 2, 3, 4)
        found = layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(4)}}, x)
        np.testing.assert_allclose(found, x @ kernel.reshape(12, 4), rtol=1e-5, atol=1e-6)

    def test_the_precision_around_a_product_counts(self):
        assert of_products() == "high"
        with products_at("highest"):
            assert of_products() == "highest"


class TestElementWise:
    """What is rounded to bfloat16, and what is not."""

    def test_gelu_of_bfloat16_is_right_to_its_last_digit(self):
        """Computed in bfloat16 it was 14 % off below -1.5."""
        x = jnp.linspace(-4.0, 4.0, 801).astype(jnp.bfloat16)
        exact = jax.nn.gelu(np.asarray(x, np.float32), approximate=False)
        np.testing.assert_allclose(np.asarray(gelu(x), np.float32), exact, rtol=2**-8, atol=1e-6)

    def test_dropout_scales_up_in_float32(self):
        """3 / 0.9 is 3.3333, of bfloat16 3.328; divided by bfloat16's 0.9, which is 0.898, it would be 3.344."""
        dropped = drop(jnp.full((1, 64), 3.0, jnp.bfloat16), 0.1, Dropout.of(jax.random.key(0), jnp.arange(1)))
        assert set(np.asarray(dropped, np.float32)[0]) == {0.0, 3.328125}

    def test_only_the_inputs_are_kept_for_the_backward_pass(self):
        x = jnp.ones((8, 8), jnp.bfloat16)
        _, pull_back = jax.vjp(in_float32(lambda x: jnp.sin(jnp.exp(x)), jnp.bfloat16), x)
        kept = [leaf for leaf in jax.tree.leaves(pull_back) if getattr(leaf, "size", 0) > 1]
        assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
