"""The demo without its page: what each tab's function gives and refuses, at toy size."""

import importlib.util
import re

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from PIL import Image

from rear_jax import jobs
from rear_jax.artifacts import TextReader
from rear_jax.demo import draw, exposure, fields, tokenizer
from rear_jax.demo.studio import COMPILING, Clock, Studio
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.jobs import demo
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling.generate import sampler_of
from rear_jax.sampling.painter import GREY, Painting
from tests import toy
from tests.test_painter import networks_of

SAMPLER = (2.0, 1.0, 1.0, 1.0, 0)  # scale, power, temperature, top-p, top-k
GRADIO = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed")


@pytest.fixture(scope="module")
def studio():
    config = toy.config(demo__batch_size=2, demo__most_images=6)
    return Studio(config, *networks_of(config), None, make_mesh(config.mesh))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture that is not square."""
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def drawn(studio):
    return list(draw.draw(studio, "Sandal, 3", 2, 5, *SAMPLER))


def test_images_appear_while_they_are_drawn(drawn):
    assert drawn[0].status == COMPILING
    assert (drawn[0].images == GREY).all()
    assert [len(shown.images) for shown in drawn] == [2] * 5 + [4] * 4  # two at once; the second two compile nothing
    assert drawn[-1].captions == ["Sandal", "Sandal", "Dress", "Dress"]
    assert re.fullmatch(r"4 of 4 images, [\d.e+]+ images/s", drawn[-1].status)
    assert re.match(r"8 of 16 codes of images 3 to 4 of 4, ", drawn[-3].status)
    np.testing.assert_array_equal(drawn[-1].images[:2], drawn[4].images)
    assert (drawn[-2].images[2:, 24:] == GREY).all()


def test_a_set_that_is_cut_into_batches_is_the_set(studio, drawn):
    """The third image is drawn in the second batch, with its own number."""
    seed, sampler = studio.settings(5, **fields.sampler_settings(SAMPLER))
    conditions = np.array([5, 5, 3, 3], np.int32)
    (*_, last) = studio._painter.paint(conditions, np.arange(4), seed, sampler)
    assert np.abs(last.images.astype(int) - drawn[-1].images).max() <= 1


@pytest.mark.slow
def test_a_prompt_is_drawn():
    """Every image has the condition of the one prompt, and its own random numbers."""
    made = toy.llamagen_config(condition="text", caption_length=3, caption_dim=5)
    read = []

    def tokens(texts):
        read.extend(texts)
        return Captions(np.ones((len(texts), 3, 5), np.float32), np.ones((len(texts), 3), bool))

    reader = TextReader(3, {}, lambda params, found: found, tokens)
    studio = Studio(made, *networks_of(made), reader, make_mesh(made.mesh))
    (*_, last) = draw.draw(studio, " a red shoe ", 2, 0, *SAMPLER)
    assert read == ["a red shoe"]
    assert last.captions == ["a red shoe"] * 2
    assert (last.images[0] != last.images[1]).any()
    with pytest.raises(RearError, match="There is no prompt: give one"):
        next(draw.draw(studio, " ", 2, 0, *SAMPLER))


@pytest.mark.parametrize(
    ("text", "each", "seed", "sampler", "message"),
    [
        ("", 1, 0, SAMPLER, "There is no class: give one."),
        ("Sandals", 1, 0, SAMPLER, "no class is called 'Sandals'. The nearest: 'Sandal' (5)"),
        ("10", 1, 0, SAMPLER, "there is no class 10: give 0 to 9"),
        ("1, 2", 4, 0, SAMPLER, "These are 8 images: draw 1 to 6"),
        ("1", None, 0, SAMPLER, "These are 0 images"),
        ("1", 1, None, SAMPLER, "The field for seed is empty"),
        ("1", 1, -1, SAMPLER, "config.seed = -1"),
        ("1", 1, 0, (None, 1.0, 1.0, 1.0, 0), "The field for guidance scale is empty"),
        ("1", 1, 0, (2.0, 1.0, 1.0, 0.0, 0), "config.sample.top_p = 0.0"),
        ("1", 1, 0, (2.0, 1.0, 1.0, 1.0, -3), "config.sample.top_k = -3"),
        ("1", 1, 0, ("x", 1.0, 1.0, 1.0, 0), "A setting is of the wrong kind"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(studio, text, each, seed, sampler, message):
    with pytest.raises(RearError, match=re.escape(message)):
        next(draw.draw(studio, text, each, seed, *sampler))


def test_a_slider_gives_whole_numbers_for_floats(studio):
    assert studio.settings(7, **fields.sampler_settings((2, 1, 0, 1, 5)))[1] == sampler_of(
        toy.config(sample__guidance_scale=2.0, sample__temperature=0.0, sample__top_k=5).sample
    )


def test_a_code_is_replaced(studio, photo):
    edited = tokenizer.read(studio, photo)
    assert edited.image.shape == (32, 32, 3)
    other = (int(edited.codes[6]) + 1) % 16
    changed, told = tokenizer.replace(studio, edited, 6, other)
    assert np.flatnonzero(changed.changed != changed.codes).tolist() == [6]
    assert told == f"Code 6 (row 2, column 3) was {edited.codes[6]} and is {other} now. Changed codes: 1."
    image, own, now, codes = tokenizer.pictures(studio, changed)
    np.testing.assert_array_equal(image[::8, ::8], edited.image)
    assert image.shape == own.shape == now.shape == (256, 256, 3)
    assert (own != now).any()
    framed = (codes == (220, 30, 30)).all(axis=-1)
    rows, columns = np.nonzero(framed)
    assert {tokenizer.position_at(studio, x, y) for x, y in zip(columns, rows, strict=True)} == {6}
    assert tokenizer.position_at(studio, codes.shape[1], 0) == -1
    for position, code in ((6, None), (6, 16), (-1, 0), (16, 0)):
        with pytest.raises(RearError, match=r"give 0 to 15|no code at this place"):
            tokenizer.replace(studio, edited, position, code)
    with pytest.raises(RearError, match="drop an image first"):
        tokenizer.replace(studio, None, 0, 0)


def test_codes_of_a_sequence_lie_in_rows():
    assert [tokenizer.columns_of(grid) for grid in ((4, 5), (1, 16), (1, 7))] == [5, 4, 3]


@pytest.mark.parametrize("share", [50, pytest.param(0, marks=pytest.mark.slow), pytest.param(100)])
def test_the_first_codes_of_an_image_are_kept(studio, photo, share):
    shown = list(exposure.continue_image(studio, photo, share, "Sandal", 2, 0, *SAMPLER))
    last, known = shown[-1], 16 * share // 100
    own = studio.decode_drawn(studio.encode(studio.read_image(photo)))
    np.testing.assert_array_equal(last.images[0], own)
    assert f"{known} of 16 codes are the image's own" in last.status
    assert last.captions[1:] == ["Sandal", "Sandal"]
    assert (last.images[1] == own).all() == (share == 100)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", b"a text", "notes.txt is not a readable image (its format is not known)"),
        ("cut.png", b"\x89PNG\r\n\x1a\n", "cut.png is not a readable image"),
        ("<b>.png", b"", "<b>.png is not a readable image"),
    ],
)
def test_what_is_no_image_is_one_sentence(studio, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for refuse in (
        lambda file: tokenizer.read(studio, file),
        lambda file: next(exposure.continue_image(studio, file, 50, "0", 1, 0, *SAMPLER)),
    ):
        with pytest.raises(RearError, match=re.escape(message)):
            refuse(str(tmp_path / name))
        with pytest.raises(RearError, match="There is no image yet"):
            refuse(None)


def test_an_image_with_too_many_pixels_is_refused(studio, tmp_path):
    Image.new("1", (20_000, 5_000)).save(tmp_path / "huge.png")
    with pytest.raises(RearError, match=r"huge\.png is not a readable image"):
        studio.read_image(str(tmp_path / "huge.png"))


def test_a_drawing_ends_with_the_page(studio):
    drawing = draw.draw(studio, "1", 1, 0, *SAMPLER)
    next(drawing)
    studio.stopping.set()
    try:
        with pytest.raises(RearError, match="The page has ended"):
            next(drawing)
    finally:
        studio.stopping.clear()


def test_the_time_of_the_compiler_does_not_count(monkeypatch):
    times = iter([0.0, 0.0, 100.0, 200.0, 201.0, 202.0])
    monkeypatch.setattr("rear_jax.demo.studio.time.monotonic", lambda: next(times))
    clock, images = Clock(16), np.zeros((2, 1, 1, 3), np.uint8)
    rates = []
    for drawn, compiling in ((0, True), (4, True), (8, False), (12, False), (16, False)):
        clock.note(Painting(images, None, drawn, compiling))
        rates.append(clock.rate)
    assert rates == [0.0, 0.0, 0.0, 0.5, 0.5]  # a quarter of two images a second


def test_errors_are_sentences_without_html(caplog):
    assert fields.sentence(RearError("<b> is no image")) == "&lt;b&gt; is no image"
    assert "config.demo.batch_size" in fields.sentence(JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))
    assert "log.txt" in fields.sentence(ValueError("x"))
    assert "ValueError: x" in caplog.text


def test_without_gradio_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RearError, match=r"pip install 'rear-jax\[demo\]'"):
        jobs.check_all(("demo",), toy.config(), tmp_path)


@GRADIO
def test_without_a_generator_nothing_is_served(tmp_path):
    with pytest.raises(RearError, match="tokenizer"):
        jobs.check_all(("demo",), toy.config(), tmp_path)
