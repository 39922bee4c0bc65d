"""Drawing that can be watched: the pictures on the way, the images of `--job=sample`, and how often it compiles."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import artifacts, generators, guidance, tokenizers
from rear_jax.config import titok
from rear_jax.jobs import sample
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import draw
from rear_jax.sampling.generate import Given, sampler_of
from rear_jax.sampling.painter import GREY, Painter, decode_some, stretch_of
from tests import toy

LABELS = np.array([3, 3, 7, 7], np.int32)


def networks_of(config):
    """Random ones, with nothing at zero so that every parameter counts."""
    module, network = toy.tokenizer(config), toy.generator(config)
    shapes = tokenizers.shapes(module), generators.shapes(network)
    rng = np.random.default_rng(0)
    of_tokenizer, of_generator = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return artifacts.Generator(network, of_generator, 0, ""), artifacts.Tokenizer(module, of_tokenizer, "", "", "")


def painter_of(config):
    return Painter(config, *networks_of(config), make_mesh(config.mesh))


@pytest.fixture(scope="module")
def painter():
    return painter_of(toy.config())


def paint(painter, sampler, seed=0, **more):
    return list(painter.paint(LABELS, np.arange(4), seed, sampler, **more))


@pytest.fixture(scope="module")
def painted(painter):
    return paint(painter, sampler_of(toy.config().sample))


def test_what_is_drawn_stays_and_the_rest_is_grey(painted):
    first, *others = painted
    assert (first.drawn, first.compiling) == (0, True)
    assert (first.images == GREY).all()
    assert [one.drawn for one in others] == [4, 8, 12, 16]
    assert [one.compiling for one in others] == [True, False, False, False]
    for one in others:
        np.testing.assert_array_equal(one.codes[:, : one.drawn], others[-1].codes[:, : one.drawn])
        assert not one.codes[:, one.drawn :].any()
        below = one.images[:, one.drawn * 2 :]  # 4 codes are a row, 8 pixels high
        assert (below == GREY).all()
        assert one.images[:, : one.drawn * 2].std() > 0


def same_images(drawn, wanted):
    """Sums in another order may round to the next of 256 levels."""
    return drawn.shape == wanted.shape and np.abs(drawn.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("scale", [2.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_the_images_are_those_of_the_program_of_the_job(painter, scale):
    config = toy.config(
        sample__guidance_scale=scale, sample__top_k=9, sample__top_p=0.9, sample__temperature=1.5, seed=5
    )
    generator, tokenizer = networks_of(config)
    program = draw.compile_sampler(config, generator.module, tokenizer.module)
    classes, rows = np.array([3, 7], np.int32), np.array([0, 0, 1, 1], np.int32)
    wanted = program(generator.params, tokenizer.params, classes, rows, np.arange(4, dtype=np.int32))
    assert same_images(paint(painter, sampler_of(config.sample), seed=5)[-1].images, np.asarray(wanted))


@pytest.mark.slow
def test_the_images_are_those_of_the_job(trained, tmp_path):
    config = toy.config(sample__classes=(3, 7), sample__images_per_class=2, seed=5)
    for name in ("tokenizer", "generator"):
        (tmp_path / name).symlink_to(trained / name)
    sample.run(config, tmp_path)
    tokenizer = artifacts.load_tokenizer(config, tmp_path)
    network = toy.generator(config)
    generator = artifacts.load_generator(config, tmp_path, tokenizer, network, stage="train")
    painter = Painter(config, generator, tokenizer, make_mesh(config.mesh))
    with np.load(tmp_path / "samples.npz") as file:
        np.testing.assert_array_equal(file["labels"], LABELS)
        assert same_images(paint(painter, sampler_of(config.sample), seed=5)[-1].images, file["arr_0"])


def test_other_numbers_compile_nothing(painter, painted):
    sampler = sampler_of(toy.config().sample)
    programs = painter._begin, painter._go_on, painter._show
    before = [program._cache_size() for program in programs]
    images = [painted[-1].images]
    for changes in ({"guidance_scale": 9.0, "guidance_power": 2.5}, {"top_k": 2}, {"top_p": 0.3}, {"temperature": 0.0}):
        paintings = paint(painter, dataclasses.replace(sampler, **changes), seed=0)
        assert not any(one.compiling for one in paintings)
        images.append(paintings[-1].images)
    images.append(paint(painter, dataclasses.replace(sampler, guidance_scale=1.0), seed=1)[-1].images)
    assert [program._cache_size() for program in programs] == before
    assert len({image.tobytes() for image in images}) == len(images)


def test_three_images_are_drawn_as_four(painter, painted):
    before = painter._begin._cache_size()
    paintings = list(painter.paint(LABELS[:3], np.arange(3), 0, sampler_of(toy.config().sample)))
    assert not any(one.compiling for one in paintings)
    last = paintings[-1]
    assert painter._begin._cache_size() == before
    assert last.images.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(last.codes, painted[-1].codes[:3])


def test_known_codes_are_kept(painter, painted):
    codes = np.random.default_rng(0).integers(0, 16, (4, 16)).astype(np.int32)
    mask = np.broadcast_to(np.arange(16) < 6, (4, 16))
    last = paint(painter, sampler_of(toy.config().sample), given=Given(codes, mask))[-1]
    np.testing.assert_array_equal(last.codes[mask], codes[mask])
    assert (last.codes != codes)[~mask].any()


@pytest.mark.parametrize(
    ("grid", "stretch"),
    [((4, 4), 4), ((8, 8), 8), ((16, 16), 16), ((24, 24), 48), ((1, 64), 4), ((1, 7), 1), ((1, 17), 17)],
)
def test_stretches_are_whole_rows_and_equally_long(grid, stretch):
    assert stretch_of(*grid) == stretch


def test_codes_of_a_sequence_that_are_not_known_are_the_mean():
    """With all codes the picture is the decoder's; a code that is not there yet makes no difference."""
    config = toy.config()
    with config.unlocked():
        config.tokenizer = titok()
        config.tokenizer.update(encoder_width=16, decoder_width=16, encoder_depth=1, decoder_depth=1, codebook_size=16)
        config.tokenizer.update(encoder_heads=2, decoder_heads=2, num_latent_tokens=8, patch_size=8, codebook_dim=4)
        config.tokenizer.predicts = "pixels"
    module = toy.tokenizer(config)
    params = module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    codes = jax.random.randint(jax.random.key(1), (2, 8), 0, 16)
    whole = module.apply({"params": params}, codes, method="decode")
    np.testing.assert_allclose(decode_some(module, params, codes, np.ones(8, bool)), whole, atol=1e-6)
    some = np.arange(8) < 5
    partly = decode_some(module, params, codes, some)
    np.testing.assert_array_equal(partly, decode_some(module, params, codes.at[:, 5:].set(0), some))
    assert np.abs(partly - whole).max() > 5e-6


@pytest.mark.parametrize("k", [0, 1, 3, 11, 12, 50])
@pytest.mark.parametrize("p", [1.0, 0.6])
def test_traced_filters_are_the_filters(k, p):
    logits = jnp.round(4 * jax.random.normal(jax.random.key(k), (5, 12)))  # with ties
    keys = jax.random.split(jax.random.key(1), 5)
    traced = jax.jit(guidance.keep_top_p)(jax.jit(guidance.keep_top_k)(logits, k), p)
    np.testing.assert_array_equal(traced, guidance.keep_top_p(guidance.keep_top_k(logits, k), p))
    for temperature in (0.0, 2.0):
        settings = {"temperature": temperature, "top_k": k, "top_p": p}
        np.testing.assert_array_equal(
            jax.jit(guidance.draw)(keys, logits, **settings), guidance.draw(keys, logits, **settings)
        )


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["class", "text"])
def test_another_family_is_painted(condition):
    """LlamaGen, whose past begins with a class or a caption."""
    made = toy.llamagen_config(condition=condition, caption_length=3, caption_dim=5)
    network, painter = toy.generator(made), painter_of(made)
    condition = jax.tree.map(lambda leaf: np.repeat(leaf, 4, axis=0), generators.family_of(network).condition(network))
    paintings = list(painter.paint(condition, np.arange(4), 0, sampler_of(made.sample)))
    assert [one.drawn for one in paintings] == [0, 4, 8, 12, 16]
