"""VQGAN+ and LlamaGen VQ beside MaskGIT-VQGAN: goldens, sizes, gradients, formats, and the jobs that use them."""

import importlib
import importlib.util
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from rear_jax import config as configs
from rear_jax import generators, jobs, tokenizers
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.runtime.identity import flatten
from rear_jax.tokenizers import quantizer
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import objectives, vq
from rear_jax.training.state import adamw, new_state
from rear_jax.weights.layout import from_torch, to_torch
from rear_jax.weights.torch_files import read_tensors
from tests import toy
from tests.golden_checks import _tokenizers

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NEW = ("vqgan_plus", "llamagen_vq")
SECTIONS = {
    "maskgit_vqgan": configs.maskgit_vqgan,
    "vqgan_plus": configs.vqgan_plus,
    "llamagen_vq": configs.llamagen_vq,
}
TINY = {
    "maskgit_vqgan": {"hidden_channels": 8, "z_channels": 6},
    "vqgan_plus": {"hidden_channels": 8, "z_channels": 5},
    "llamagen_vq": {"channels": 8, "z_channels": 7, "codebook_dim": 3},
}
DIMENSIONS = {"maskgit_vqgan": 6, "vqgan_plus": 5, "llamagen_vq": 3}
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
SEQUENCES = {"titok", "alitok"}  # see test_sequence_tokenizers.py
TOKENIZER_CONFIGS = sorted(
    file for file in (toy.ROOT / "configs").glob("tokenizer_*.py") if file.stem.split("_")[1] not in SEQUENCES
)
PUBLISHED = {  # millions of parameters, codes per side, codebook
    "maskgit_vqgan": (54.5, 16, (1024, 256)),
    "vqgan_plus": (55.0, 16, (4096, 64)),
    "llamagen_vq16": (71.9, 16, (16384, 8)),
    "llamagen_vq8": (70.1, 32, (16384, 8)),
}


def quick(function):
    """`jax.jit` for programs that run once: compiled in a third of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def golden_tensors(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as golden:
        return _tokenizers.tensors_of(golden)


def get_config(file: pathlib.Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def shrunk(section: ConfigDict, **changes) -> ConfigDict:
    """The same tokenizer section at toy size."""
    common = {"channel_mult": (1, 2), "num_res_blocks": 1, "codebook_size": 12}
    section.update(common | TINY[section.name] | changes)
    return section


def drawn(shapes):
    """Weights drawn without running (hence compiling) `init`."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(leaf.dtype), shapes)


def tiny(name: str, **changes):
    tokenizer = tokenizers.build(shrunk(SECTIONS[name](), **changes), 8)
    return tokenizer, drawn(tokenizers.shapes(tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_golden(name):
    with np.load(GOLDENS / f"{name}.npz") as golden:
        importlib.import_module(f"tests.golden_checks.{name}").check(dict(golden))


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_recipe_builds_the_published_network(name):
    millions, side, codebook = PUBLISHED[name]
    config = get_config(toy.ROOT / "configs" / f"tokenizer_{name}.py")
    assert config.jobs == ("tokenizer",)
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    shapes = tokenizers.shapes(tokenizer)
    assert set(shapes) == {"encoder", "decoder", "codebook"}
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, abs=0.05)
    assert tokenizer.grid == (side, side)
    assert tokenizer.codes_per_image == side**2
    assert shapes["codebook"].shape == codebook == (tokenizer.codebook_size, tokenizer.embedding_dim)
    assert shapes["decoder"]["conv_out"]["kernel"].shape == (3, 3, 128, 3)


def test_one_network_serves_larger_images():
    sizes = [tokenizers.build(configs.llamagen_vq(), size).grid for size in (256, 384, 512)]
    assert sizes == [(16, 16), (24, 24), (32, 32)]


@pytest.mark.parametrize("name", SECTIONS)
def test_an_image_size_that_cannot_be_halved_is_refused(name):
    with pytest.raises(RearError, match=r"data\.image_size 250 is not a multiple of 16: .*channel_mult"):
        tokenizers.build(SECTIONS[name](), 250)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_the_interface_is_consistent_with_itself(name):
    tokenizer, params = tiny(name)

    @quick
    def run(images):
        def call(method, x):
            return tokenizer.apply({"params": params}, x, method=method)

        codes = call(tokenizer.encode, images)
        vectors = call(tokenizer.embed, codes)
        grid = vectors.reshape(2, 4, 4, -1)
        decoded = [call(tokenizer.decode, codes)] + [call(tokenizer.decode_embeddings, v) for v in (vectors, grid)]
        return call(tokenizer.latents, images), codes, vectors, decoded, tokenizer.apply({"params": params}, images)

    latents, codes, vectors, decoded, (reconstruction, quantized) = run(IMAGES)
    assert latents.shape == (2, 4, 4, DIMENSIONS[name]) == (2, *tokenizer.grid, tokenizer.embedding_dim)
    assert codes.shape == (2, 16)
    assert codes.dtype == jnp.int32
    assert np.unique(codes).size > 1
    np.testing.assert_array_equal(quantized.codes.reshape(2, 16), codes)
    unit_length = np.allclose(np.linalg.norm(vectors, axis=-1), 1.0, atol=1e-5)
    assert unit_length is tokenizer.l2_normalize
    assert reconstruction.shape == IMAGES.shape
    for images in decoded:
        np.testing.assert_allclose(images, reconstruction, atol=1e-5)


def test_llamagen_codes_do_not_depend_on_the_length_of_codebook_vectors():
    tokenizer, params = tiny("llamagen_vq")
    scale = np.linspace(0.1, 10.0, 12, dtype=np.float32)[:, None]
    run = quick(lambda codebook: tokenizer.apply({"params": params | {"codebook": codebook}}, IMAGES))
    (want, quantized), (image, scaled) = run(params["codebook"]), run(scale * params["codebook"])
    np.testing.assert_array_equal(scaled.codes, quantized.codes)
    np.testing.assert_allclose(image, want, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_bfloat16_keeps_parameters_latents_and_images_in_float32(name):
    tokenizer, params = tiny(name, dtype="bfloat16")
    exact, _ = tiny(name)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    latents, want = (
        quick(lambda x, t=t: t.apply({"params": params}, x, method=t.latents))(IMAGES) for t in (tokenizer, exact)
    )
    assert latents.dtype == jnp.float32
    assert np.linalg.norm(latents - want) < 0.05 * np.linalg.norm(want)
    reconstruction, quantized = jax.eval_shape(tokenizer.apply, {"params": params}, IMAGES)
    assert reconstruction.dtype == quantized.vectors.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_the_gradient_flows_straight_through(name):
    """The encoder's gradient is the decoder's at the codes, pulled back as if no code had been looked up."""
    tokenizer, params = tiny(name)
    weights = jax.random.normal(jax.random.key(1), IMAGES.shape)

    def through_codes(params):
        return jnp.vdot(weights, tokenizer.apply({"params": params}, IMAGES)[0])

    def latents(encoder):
        found = tokenizer.apply({"params": params | {"encoder": encoder}}, IMAGES, method=tokenizer.latents)
        return quantizer.unit(found) if tokenizer.l2_normalize else found

    def decoded(vectors):
        images = tokenizer.apply({"params": params}, vectors, method=tokenizer.decode_embeddings)
        return jnp.vdot(weights, images)

    @jax.jit
    def both(params):
        codes = tokenizer.apply({"params": params}, IMAGES, method=tokenizer.encode)
        vectors = tokenizer.apply({"params": params}, codes, method=tokenizer.embed)
        _, pull_back = jax.vjp(latents, params["encoder"])
        (want,) = pull_back(jax.grad(decoded)(vectors.reshape(2, *tokenizer.grid, -1)))
        return jax.grad(through_codes)(params), want

    gradients, want = both(params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    assert largest > 0
    chex.assert_trees_all_close(gradients["encoder"], want, atol=1e-4 * largest)
    np.testing.assert_array_equal(gradients["codebook"], 0.0)


def test_there_is_a_recipe_for_every_tokenizer():
    assert [file.stem.removeprefix("tokenizer_") for file in TOKENIZER_CONFIGS] == sorted(PUBLISHED)
    recipes = [get_config(file) for file in TOKENIZER_CONFIGS]
    assert {recipe.tokenizer.name for recipe in recipes} == set(SECTIONS) == set(tokenizers.FAMILIES) - SEQUENCES
    assert all(recipe.tokenizer_training.discriminator_weight > 0 for recipe in recipes)


def test_the_recipes_of_llamagen_differ_in_one_setting():
    vq16, vq8 = (flatten(get_config(file).to_dict()) for file in TOKENIZER_CONFIGS[:2])
    assert {key for key in vq16 if vq16[key] != vq8[key]} == {"tokenizer.channel_mult"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "llamagen_vq8"])
def test_one_real_training_step_of_every_recipe(name):
    config = get_config(toy.ROOT / "configs" / f"tokenizer_{name}.py")
    shrunk(config.tokenizer)
    config.data.image_size = 8
    settings = config.tokenizer_training
    settings.perceptual_weight = 0.0  # networks of their own, tested elsewhere
    settings.discriminator_start = 0
    settings.discriminator_layers = 1
    settings.discriminator_channels = 4
    settings.optimizer.warmup_steps = 0
    tokenizer = tokenizers.build(config.tokenizer, 8)
    networks = vq.Networks(tokenizer, None, PatchDiscriminator(4, 1))
    optimizer = vq.make_optimizer(config, vq.learning(config, networks, {}, {}).rules)
    params = drawn(jax.eval_shape(lambda: vq.init_state(networks, config, optimizer, {})).params)
    usage = quantizer.init_codebook_state(params["tokenizer"]["codebook"], method=settings.codebook_update)
    state = new_state(params, optimizer, extra=usage)
    batch = {"image": (255 * IMAGES).astype(jnp.uint8)}
    step = quick(vq.tokenizer_step(networks, config, optimizer))
    after, metrics = step(state, batch, jax.random.key(0), {"perceptual": None})
    assert all(jnp.isfinite(value) for value in metrics.values()), metrics
    ratio = metrics["adversarial_weight"] / settings.discriminator_weight
    assert ratio > 0
    assert (ratio == pytest.approx(1.0)) is not settings.discriminator_adaptive
    before = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, old), new in zip(before, jax.tree.leaves(after.params), strict=True):
        if path[-1].key in ("kernel", "codebook"):  # a norm can cancel a bias before it
            assert jnp.any(old != new), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_one_rear_step_on_embeddings_of_any_width(name):
    tokenizer, params = tiny(name)
    config = toy.config(tokenizer=shrunk(SECTIONS[name]()), data__image_size=8, train__optimizer__warmup_steps=0)
    model = objectives.build_generator(config, tokenizer)
    optimizer = adamw(config.train.optimizer, config.train.loop.steps, generators.family_of(model).parameters)
    codebook = tokenizer.apply({"params": params}, jnp.arange(12), method=tokenizer.embed)
    assert codebook.shape == (12, DIMENSIONS[name])
    codes = jax.random.randint(jax.random.key(1), (4, tokenizer.codes_per_image), 0, 12)
    batch = {"codes": codes, "label": jnp.arange(4)}
    shapes = jax.eval_shape(model.init, jax.random.key(0), codes, batch["label"])["params"]
    state = new_state(drawn(shapes), optimizer)
    step = quick(objectives.train_step(model, config, optimizer))
    after, metrics = step(state, batch, jax.random.key(2), {"codebook": codebook})
    assert metrics["loss"] == pytest.approx(
        float(metrics["cross_entropy"] + metrics["shallow"] + metrics["deep"]), rel=1e-5
    )
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, after.params)
    assert all(jax.tree.leaves([moved["shallow_projector"], moved["deep_projector"]]))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_from_images_to_samples(name, tmp_path):
    for job in ("tokenizer", "tokenize", "train", "sample"):
        section = shrunk(SECTIONS[name](), channel_mult=(1, 1, 2, 2))
        jobs.JOBS[job].run(toy.config(tokenizer=section), tmp_path)
    assert (tmp_path / "samples.npz").exists()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_signature_is_in_files_of_its_own_network_only(name):
    found = {other for other in SECTIONS for key in golden_tensors(other) if matches(name, key)}
    assert found == {name}


def matches(name: str, key: str) -> bool:
    return re.fullmatch(tokenizers.FAMILIES[name].layout.signature, key) is not None


@pytest.mark.parametrize("name", SECTIONS)
def test_a_file_goes_out_and_comes_back(name, tmp_path):
    tokenizer, params = tiny(name, channel_mult=(1, 2, 2))
    layout = tokenizers.FAMILIES[name].layout
    tensors = to_torch(params, layout.torch_name)
    useless = {f"{prefix}": np.zeros(3, np.float32) for prefix in layout.ignore}
    save_file(tensors | useless, tmp_path / "file.safetensors")
    read = read_tensors(tmp_path / "file.safetensors")
    section = SECTIONS[name]()
    section.update(layout.sizes(read))
    assert section == shrunk(SECTIONS[name](), channel_mult=(1, 2, 2))
    again = from_torch(read, tokenizers.shapes(tokenizer), layout.torch_name, ignore=layout.ignore)
    chex.assert_trees_all_equal(again, params)


@pytest.mark.parametrize("name", SECTIONS)
def test_sizes_name_what_a_foreign_file_lacks(name, tmp_path):
    family, own, path = tokenizers.FAMILIES[name], golden_tensors(name), tmp_path / "x.safetensors"
    section = SECTIONS[name]()
    section.update(family.layout.sizes(own))
    config, shapes = toy.config(tokenizer=section), tokenizers.shapes(tokenizers.build(section, 16))

    def refused(tensors, message):
        save_file(tensors, path)
        with pytest.raises(RearError, match=message) as caught:
            published.read_params(path, config, family, shapes)
        assert "\n" not in str(caught.value)

    (known_by,) = {key for key in own if matches(name, key)}
    whole = rf"it is not a whole {name} checkpoint\. Give such a file, or the config of the network that this one holds"
    for other in set(SECTIONS) - {name}:
        foreign = golden_tensors(other)
        with pytest.raises(KeyError, match=r"encoder\."):
            family.layout.sizes(foreign)
        refused(foreign, rf"with config\.tokenizer\.name '{other}' \(config: '{name}'\).*: use that network's config")
    refused({known_by: own[known_by]}, rf"x\.safetensors has no tensor 'encoder\..*': {whole}")
    without_codebook = {key: tensor for key, tensor in own.items() if not key.startswith("quantize.")}
    refused(without_codebook, rf"has no tensor 'quantize\.embedding\.weight': {whole}")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("vqgan_plus", "encoder.down.0.down_conv.bias"),
        ("vqgan_plus", "decoder.mid.res_blocks.0.norm1.weight"),
        ("llamagen_vq", "decoder.conv_blocks.0.upsample.conv.weight"),
        ("llamagen_vq", "post_quant_conv.bias"),
    ],
)
def test_a_missing_tensor_is_named(name, key):
    layout, tensors = tokenizers.FAMILIES[name].layout, golden_tensors(name)
    section = SECTIONS[name]()
    section.update(layout.sizes(tensors))
    shapes = tokenizers.shapes(tokenizers.build(section, 16))
    del tensors[key]
    with pytest.raises(RearError, match=rf"1 missing: {re.escape(key)}\."):
        from_torch(tensors, shapes, layout.torch_name, ignore=layout.ignore)
