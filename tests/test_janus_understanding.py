"""Janus-Pro's understanding side: decoding is the full forward pass, rows stand alone, pictures of every shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from rear_jax.errors import RearError
from rear_jax.generators.janus import preprocess, understanding_files
from rear_jax.generators.janus.understanding import Answering, answer
from rear_jax.runtime.precision import products_at, standing_in_for
from rear_jax.text.janus_vocabulary import ANSWERING, SPECIAL, JanusVocabulary
from tests import toy_understanding
from tests.golden_checks.janus_understanding import loaded, pixels_of
from tests.test_janus_vocabulary import reference
from tests.toy import ROOT

TOKENS = 6


@pytest.fixture(scope="module")
def janus(tmp_path_factory):
    """A folder as a hub hands it out; do not change it."""
    return toy_understanding.folder(tmp_path_factory.mktemp("hub") / "janus")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(ROOT / "tests" / "goldens" / "janus_understanding.npz") as file:
        return dict(file)


@functools.cache
def network():
    return loaded(golden())


@functools.cache
def asked():
    """Pixels, ids and mask of three questions of different lengths, about an image each."""
    return pixels_of(golden(), range(3)), golden()["in/ids"], golden()["in/mask"]


@functools.cache
def program(answering: Answering):
    """Tokens and logits of answers that are drawn in this way."""

    def run(params, pixels, ids, mask, seeds, wanted):
        keys = jax.vmap(jax.random.key)(seeds)
        return answer(network()[0], params, pixels, ids, mask, keys, answering, wanted=wanted, return_logits=True)

    return jax.jit(run)


def said(pixels, ids, mask, *, seeds=(0, 1, 2), wanted=(True, True, True), end_id=2, **settings):
    """Tokens and logits of the answers."""
    rows = np.array(seeds), np.array(wanted)[: len(ids)]
    with products_at("highest"):
        run = program(Answering(end_id, TOKENS, **settings))
        return jax.tree.map(np.asarray, run(network()[1], pixels, ids, mask, *rows))


@pytest.mark.slow
def test_decoding_is_the_full_forward_pass():
    module, params = network()
    pixels, ids, mask = asked()
    tokens, logits = said(pixels, ids, mask)
    whole = np.concatenate([ids, tokens[:, :-1]], axis=1)
    seen = np.pad(mask, ((0, 0), (0, TOKENS - 1)), constant_values=True)
    forward = jax.jit(module.apply)({"params": params}, pixels, whole, seen)
    np.testing.assert_allclose(forward[:, ids.shape[1] - 1 :], logits, atol=2e-5)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1), tokens)


@pytest.mark.slow
def test_a_row_depends_neither_on_its_padding_nor_on_its_neighbours():
    pixels, ids, mask = asked()
    tokens, logits = said(pixels, ids, mask)
    for row in (0, 2):
        start = int(np.argmax(mask[row]))
        alone, near = said(pixels[row, None], ids[row, None, start:], mask[row, None, start:], seeds=(row,))
        np.testing.assert_array_equal(alone[0], tokens[row])
        np.testing.assert_allclose(near[0], logits[row], atol=5e-5)


def test_what_the_image_shows_is_what_is_read():
    pixels, ids, mask = asked()
    _, logits = said(pixels, ids, mask)
    _, others = said(pixels[[1, 0, 2]], ids, mask)
    apart = np.abs(logits[:, 0] - others[:, 0]).max(axis=1)
    assert apart[:2].min() > 0.1
    assert apart[2] < 1e-5


def test_features_take_the_places_of_the_placeholders_in_order():
    module, params = network()
    ids = np.array([[9, 6, 6, 10, 6], [6, 11, 6, 6, 12]])
    features = np.arange(2 * 3 * module.width, dtype=np.float32).reshape(2, 3, -1)
    x = module.apply({"params": params}, features, ids, method="embed")
    np.testing.assert_array_equal(x[0, [1, 2, 4]], features[0])
    np.testing.assert_array_equal(x[1, [0, 2, 3]], features[1])
    np.testing.assert_array_equal(x[0, [0, 3]], params["token_embeddings"][[9, 10]])


def test_answers_end_and_nothing_is_drawn_after_the_last_end():
    pixels, ids, mask = asked()
    tokens, _ = said(pixels, ids, mask)
    end = int(tokens[1, 2])
    ended, logits = said(pixels, ids, mask, end_id=end, wanted=(False, True, False))
    assert ended[1].tolist() == [*tokens[1, : tokens[1].tolist().index(end)], *[end] * (TOKENS - 2)]
    assert (ended[[0, 2]] == end).all()  # rows that nobody asked for
    assert np.abs(logits[1, 2]).max() > 0
    assert (logits[:, 3:] == 0).all()  # the program has stopped


@pytest.mark.slow
def test_sampling_has_a_key_of_its_own_in_each_row():
    pixels, ids, mask = asked()
    drawn = {"temperature": 2.0}
    tokens, _ = said(pixels, ids, mask, **drawn)
    swapped, _ = said(pixels[::-1], ids[::-1], mask[::-1], seeds=(2, 1, 0), **drawn)
    np.testing.assert_array_equal(swapped[::-1], tokens)
    assert (tokens != said(pixels, ids, mask, seeds=(3, 4, 5), **drawn)[0]).any()
    greedy, _ = said(pixels, ids, mask)
    assert (tokens != greedy).any()
    np.testing.assert_array_equal(said(pixels, ids, mask, top_p=1e-6, **drawn)[0], greedy)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (7, 40), (40, 7), (383, 384), (100, 100)])
def test_pictures_of_every_shape_stand_on_a_grey_square(shape):
    size = 48
    square = preprocess.on_a_square(np.full((*shape, 3), 250, np.uint8), size)
    assert square.shape == (size, size, 3)
    height, width = (max(round(side * size / max(shape)), preprocess.SMALLEST_SIDE) for side in shape)
    rows, columns = np.nonzero(square[..., 0] == 250)
    assert (square[..., 0] == 127).sum() == size**2 - height * width == size**2 - len(rows)
    assert (rows.min(), columns.min()) == ((size - height) // 2, (size - width) // 2)


def test_a_tall_strip_is_resized_as_pillow_does_it_but_for_a_level_or_two():
    image = np.random.default_rng(0).integers(0, 256, (400, 6, 3), np.uint8)
    plain = np.asarray(Image.fromarray(image).resize((14, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(preprocess.on_a_square(image, 48)[:, 17:31] - plain).max() <= 2


def test_no_picture_grows_on_the_way(monkeypatch):
    """Pillow alone would make [8000, 384] of this strip first."""
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *rest: sizes.append(size) or resize(self, size, *rest)
    )
    preprocess.on_a_square(np.zeros((8000, 1, 3), np.uint8), 384)
    assert sizes == [(1, 384), (14, 384)]


def test_a_question_has_the_ids_of_the_authors_template(janus):
    vocabulary = JanusVocabulary(janus)
    image = "<begin_of_image>" + "<image_placeholder>" * 4 + "<end_of_image>"
    asked = f"{ANSWERING}<|User|>: {image}\nWhat is it?\n\n<|Assistant|>:"
    found = vocabulary.question(" What is it?\n", 4)
    assert found == [vocabulary.start_id, *reference().encode(asked, add_special_tokens=False).ids]
    assert vocabulary.question("<image_placeholder>", 4).count(vocabulary.image_placeholder_id) == 4


def test_the_text_of_an_answer(janus):
    vocabulary = JanusVocabulary(janus)
    ids = vocabulary.tokens(" a blue bird, très jolie")
    assert vocabulary.text([*ids, vocabulary.end_id, *ids]) == "a blue bird, très jolie"
    assert vocabulary.text([vocabulary.user_id, *ids, vocabulary.pad_id]) == "a blue bird, très jolie"
    assert vocabulary.text(vocabulary.tokens("bird 🐦")[:-1]) == "bird"  # not half a character
    assert vocabulary.text([vocabulary.end_id]) == vocabulary.text([]) == ""
    assert SPECIAL["end_id"] not in vocabulary.text([*ids, vocabulary.end_id])


def test_sizes_are_those_of_the_file(janus):
    found = understanding_files.load(str(janus), placeholder_id=3, dtype="bfloat16")
    sizes = toy_understanding.SIZES | toy_understanding.OF_IMAGES | toy_understanding.HEADS
    assert {name: getattr(found.module, name) for name in sizes} == sizes
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.params)} == {"bfloat16"}
    again = understanding_files.load(str(janus / "model.safetensors"), placeholder_id=3, dtype="float32")
    assert again.fingerprint != found.fingerprint


def test_files_of_transformers_hold_the_same(janus, tmp_path):
    renamed = toy_understanding.for_transformers(load_file(janus / "model.safetensors"))
    save_file(renamed, tmp_path / "model.safetensors")
    found = understanding_files.load(str(tmp_path), placeholder_id=3)
    wanted = understanding_files.load(str(janus), placeholder_id=3)
    assert (found.module, found.fingerprint) == (wanted.module, wanted.fingerprint)
    del renamed["model.vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(RearError, match=r"lacks model\.vision_model\.encoder\.layers\.0\.self_attn\.k_proj\.bias"):
        understanding_files.load(str(tmp_path), placeholder_id=3)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("aligner.layers.0.bias", lambda x: x * np.nan, "aligner.layers.0.bias is not finite"),
        ("aligner.layers.0.bias", lambda x: x[1:], "of another shape: aligner.layers.0.bias"),
        ("vision_model.vision_tower.pos_embed", lambda x: x[0], "its layers have other shapes"),
        ("vision_model.vision_tower.pos_embed", lambda x: x[..., :62], "whose heads are not known here"),
        ("vision_model.vision_tower.pos_embed", lambda x: x[:, :3], "of another shape"),
    ],
)
def test_wrong_files_are_named(janus, tmp_path, key, change, message):
    tensors = load_file(janus / "model.safetensors")
    save_file(tensors | {key: np.ascontiguousarray(change(tensors[key]))}, tmp_path / "bad.safetensors")
    with pytest.raises(RearError, match=rf"bad\.safetensors.*{message}") as error:
        understanding_files.load(str(tmp_path / "bad.safetensors"), placeholder_id=3)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_cache_of_a_tpu_gives_the_same_answers():
    pixels, ids, mask = asked()
    tokens, logits = said(pixels, ids, mask)
    program.cache_clear()
    with standing_in_for("tpu"):
        there, near = said(pixels, ids, mask)
    program.cache_clear()
    np.testing.assert_array_equal(there, tokens)
    np.testing.assert_allclose(near, logits, atol=5e-5)


@pytest.mark.slow
def test_the_published_sizes():
    """316.3M of the tower and its pool, 6.3M of the aligner, 1652.7M of the language model with its head."""
    sizes = {"width": 2048, "depth": 24, "heads": 16, "mlp_width": 5632, "vocabulary_size": 102_400}
    vision = {"vision_width": 1024, "vision_depth": 24, "vision_heads": 16, "image_size": 384, "patch_size": 16}
    module = understanding_files.Understanding(**sizes, **vision, placeholder_id=0, dtype=jnp.dtype("bfloat16"))
    shapes = understanding_files.shapes(module)
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) / 1e6 for name, part in shapes.items()}
    pool = (2 * 1024 * 1024 * 2 + 2 * 1024**2 * 4 + 1024 * 13) / 1e6  # q kv proj, an MLP, a norm, biases, the probe
    assert counts["tower"] + pool == pytest.approx(316.3, abs=0.3)
    assert counts["aligner"] == pytest.approx(6.3, abs=0.05)
    language = sum(count for name, count in counts.items() if name not in ("tower", "aligner"))
    assert language == pytest.approx(1652.7, abs=0.05)
    assert module.num_patches == 576
    ids = jax.ShapeDtypeStruct((2, 640), jnp.int32)
    pixels, keys = jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.float32), jax.random.split(jax.random.key(0), 2)
    said = jax.eval_shape(
        lambda params, pixels, ids: answer(module, params, pixels, ids, ids > 0, keys, Answering(1, 100)),
        shapes,
        pixels,
        ids,
    )
    assert (said.shape, said.dtype) == ((2, 100), jnp.int32)
