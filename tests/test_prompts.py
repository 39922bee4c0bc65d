"""Prompts: the files they come in, what is refused, and pictures and file names that carry them."""

import hashlib
import json
import re
import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image, ImageFont

from rear_jax import artifacts, generators, jobs, tokenizers
from rear_jax.data.prompts import MOST_WORDS, Prompt, given_prompts, read_prompts, write_prompts
from rear_jax.errors import RearError
from rear_jax.generators.interface import Captions
from rear_jax.plan import programs
from rear_jax.runtime import pictures
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling import conditions as of_sampling
from rear_jax.weights import safetensors_file
from tests import toy

GENEVAL = '{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"}'
MARK = "\ufeff"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a dog\nein Bär, 東京 🐻", ["a dog", "ein Bär, 東京 🐻"]),
        ("a.txt", MARK + "a dog\r\n  a cat \r\n\r\n \n\n", ["a dog", "a cat"]),
        ("a.txt", "one\x0bline\u2028still\n", ["one\x0bline\u2028still"]),
        ("a.jsonl", '{"prompt": "a dog"}\r\n{"text": "a cat"}\n{"caption": "a cow"}\n', ["a dog", "a cat", "a cow"]),
        ("a.jsonl", MARK + '{"caption": "no", "text": "no", "prompt": "two\\nlines"}', ["two\nlines"]),
        ("a.jsonl", '{"prompt": "a dog", "category": null}', ["a dog"]),
        ("a.TSV", "Prompt\na dog\n", ["a dog"]),
        ("a.tsv", 'Note\tPrompt\r\nx\ta sign "STOP"\r\n', ['a sign "STOP"']),
        ("a.tsv", 'Prompt\tNote\n"a ""big"" dog"\t\n', ['a "big" dog']),
    ],
)
def test_prompts_are_read(tmp_path, name, content, expected):
    assert read_prompts(write(tmp_path / name, content)) == [Prompt(text) for text in expected]


def test_categories_are_kept(tmp_path):
    parti = "Prompt\tCategory\tChallenge\tNote\na shiba inu\tAnimals\tBasic\t\n42\tAbstract\tBasic\tSimple numbers\n"
    assert read_prompts(write(tmp_path / "p.tsv", parti)) == [
        Prompt("a shiba inu", "Animals"),
        Prompt("42", "Abstract"),
    ]
    line = '{"prompt": "a dog", "category": "Animals"}'
    assert read_prompts(write(tmp_path / "p.jsonl", line)) == [Prompt("a dog", "Animals")]


def test_lines_of_geneval_are_kept_as_they_are(tmp_path):
    (found,) = read_prompts(write(tmp_path / "evaluation_metadata.jsonl", GENEVAL + " \r\n"))
    assert found == Prompt("a red dog", "colors", GENEVAL)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a dog\n\na cat\n", "line 2 is blank"),
        ("a.txt", b"a dog\na b\xe4r\n", r"line 2 is not UTF-8 \(byte 4\)"),
        ("a.txt", "a dog\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.txt", "a dog\ra cat\r", "line 1 has a carriage return inside"),
        ("a.txt", "a dog\n" + "word " * 10_000, "line 2 has 10000 words, .* at most 1000 words"),
        ("a.txt", "x" * 10_001, "line 1 has 1 words, 10001 characters"),
        ("a.txt", "", "holds no prompts"),
        ("a.txt", MARK + "\r\n\n", "holds no prompts"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.tsv", "", "holds no prompts"),
        ("a.tsv", "Prompt\n\n", "holds no prompts"),
        ("a.csv", "a dog", "is no file of prompts: give a .txt, .jsonl, .tsv, .json file"),
        ("a.json", "[]", "holds no prompts"),
        ("a.json", "", "is not JSON"),
        ("a.json", b"[\xff]", "is not JSON"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.json", '{"prompt": "a dog"}', "is a dict, not a list of prompts"),
        ("a.json", '["a dog", 3]', "prompt 2 is a int, not text"),
        ("a.jsonl", '{"prompt": "a"}\n{"a": 1, "b": 2}', "line 2 has no key prompt, text or caption: it has 'a', 'b'"),
        ("a.jsonl", "{}", "line 1 has no key .* it has none"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ("a.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", '["a dog"]', "line 1 is a list, not a JSON object"),
        ("a.jsonl", '{"text": ["a dog", "the dog"]}', "line 1, key 'text' is a list, not text"),
        ("a.jsonl", '{"prompt": " "}', "line 1, key 'prompt' holds a blank prompt"),
        ("a.jsonl", '{"prompt": "a \\ud83d dog"}', r"line 1, key 'prompt' holds half a character, '\\ud83d'"),
        ("a.tsv", "a dog\tAnimals\na cat\tAnimals\n", "line 1 names no column Prompt: it has 'a dog', 'Animals'"),
        ("a.tsv", "Category\tPrompt\nx\ta dog\nx\n", "line 3 has 1 columns and no Prompt"),
        ("a.tsv", "Category\tPrompt\nx\t\n", "line 2 holds a blank prompt"),
        ("a.tsv", "Prompt\n" + "x" * 200_000, "line 2 is no row of columns"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(tmp_path, name, content, message):
    with pytest.raises(RearError, match=message) as refused:
        read_prompts(write(tmp_path / name, content))
    assert "\n" not in str(refused.value)
    assert str(tmp_path / name) in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RearError, match=r"There is no file of prompts .*none.txt"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(RearError, match=r"holds none of anime.json, concept-art.json, paintings.json, photo.json"):
        read_prompts(str(tmp_path))


def test_styles_of_a_folder(tmp_path):
    write(tmp_path / "photo.json", '["a dog", "a cat"]')
    write(tmp_path / "anime.json", MARK + '[" a cow "]\r\n')
    write(tmp_path / "drawbench.json", '["no"]')
    assert read_prompts(tmp_path) == [Prompt("a cow", "anime"), Prompt("a dog", "photo"), Prompt("a cat", "photo")]
    assert read_prompts(tmp_path / "drawbench.json") == [Prompt("no", "drawbench")]


def test_a_prompt_of_as_many_words_as_there_may_be(tmp_path):
    assert len(read_prompts(write(tmp_path / "a.txt", "word " * MOST_WORDS))) == 1


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1).map(str.strip).filter(bool)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1))
def test_written_prompts_are_read_again(tmp_path_factory, texts):
    file = tmp_path_factory.getbasetemp() / "prompts.jsonl"
    prompts = [*(Prompt(*pair) for pair in texts), Prompt("a red dog", "colors", GENEVAL)]
    write_prompts(file, prompts)
    assert read_prompts(file) == prompts
    assert len([json.loads(line) for line in file.read_text().split("\n")[:-1]]) == len(prompts)


def settings(**changes):
    return ConfigDict({"prompts": "", "prompt": ""} | changes)


def test_prompts_are_those_of_the_settings(tmp_path):
    file = str(write(tmp_path / "a.txt", "a dog\na cat"))
    assert given_prompts(settings()) == []
    assert given_prompts(settings(prompt=" a red dog ")) == [Prompt("a red dog")]
    assert given_prompts(settings(prompts=file)) == [Prompt("a dog"), Prompt("a cat")]
    with pytest.raises(RearError, match="are both set"):
        given_prompts(settings(prompts=file, prompt="a red dog"))
    with pytest.raises(RearError, match=r"config.sample.prompt holds a blank prompt"):
        given_prompts(settings(prompt=" "))
    with pytest.raises(RearError, match=r"config.sample.prompt has 1001 words"):
        given_prompts(settings(prompt="word " * 1001))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a photo of a red dog", "0003_a-photo-of-a-red-dog_01.png"),
        ("  Salvador Dalí's CAT!? ", "0003_salvador-dali-s-cat_01.png"),
        ("../../etc/passwd", "0003_etc-passwd_01.png"),
        ("東京 🐻", "0003_prompt_01.png"),
        ("CON", "0003_con_01.png"),
        ("a" * 59 + " b", "0003_" + "a" * 59 + "_01.png"),
        ("a\x00b\nc\ud83d", "0003_a-b-c_01.png"),
    ],
)
def test_file_names_are_made_from_prompts(prompt, name):
    assert pictures.prompt_file_name(3, prompt, 1) == name


@given(st.text())
def test_file_names_are_safe_and_short(prompt):
    name = pictures.prompt_file_name(12345, prompt, 678)
    assert re.fullmatch(r"12345_[a-z0-9]([a-z0-9-]*[a-z0-9])?_678\.png", name)
    assert len(name) <= 80


def test_file_names_are_unique():
    prompts = ["a_1", "a", "a 1", "a", "", "a_1_1"]
    names = {pictures.prompt_file_name(i, prompt, j) for i, prompt in enumerate(prompts) for j in range(120)}
    assert len(names) == len(prompts) * 120


FONT = ImageFont.load_default(size=12)


@given(st.text(st.characters(), max_size=300), st.integers(30, 240), st.integers(1, 5))
def test_any_text_is_wrapped(text, width, most_lines):
    lines = pictures.wrapped(text, FONT, width, most_lines)
    assert 1 <= len(lines) <= most_lines
    assert all(FONT.getlength(line) <= width or len(line) == 1 for line in lines)
    assert pictures.prompt_sheet(np.zeros((1, 1, 64, 64, 3), np.uint8), [text]).shape == (64, 304, 3)


def test_prompts_are_wrapped_at_blanks_and_cut_at_the_end():
    assert pictures.wrapped("a photo of a red dog", FONT, 1000, 4) == ["a photo of a red dog"]
    lines = pictures.wrapped("a photo of a red dog", FONT, 60, 4)
    assert len(lines) > 1
    assert " ".join(lines) == "a photo of a red dog"
    assert "".join(pictures.wrapped("x" * 50, FONT, 60, 50)) == "x" * 50
    assert pictures.wrapped("a photo of a red dog", FONT, 60, 1) == ["a photo …"]
    assert pictures.wrapped("Dalí", FONT, 60, 1) == ["Dali"]


def test_a_sheet_has_a_row_for_each_prompt():
    images = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * np.ones((32, 32, 3), np.uint8)
    sheet = pictures.prompt_sheet(images, ["a photo of a red dog", "東京 \ud83d\x00\n" * 100])
    assert sheet.shape == (64 + 2 + 64, 240 + 3 * 64 + 2, 3)
    np.testing.assert_array_equal(sheet[:64, 240:304], 0)
    np.testing.assert_array_equal(sheet[66:, 240 + 2 * 65 :], 5)
    text = sheet[:64, :240]
    assert text[:16].min() < 100  # one line of ink
    assert text[16:].min() == 255


def test_a_folder_of_named_images(tmp_path):
    images = np.arange(2, dtype=np.uint8).reshape(2, 1, 1, 1) * np.ones((4, 4, 3), np.uint8)
    pictures.save_folder(tmp_path / "samples", images, ["b.png", "a.png"])
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == ["a.png", "b.png"]
    with Image.open(tmp_path / "samples" / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), images[1])


LENGTH, DIM = 3, 4  # of the features of a prompt
METADATA = "\n".join(GENEVAL.replace("red", colour) for colour in ("red", "green", "blue"))


def features_of(texts):
    """Stands for a text encoder: random features that depend on the text alone, some of them padding."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) for text in texts]
    features = np.stack([np.random.default_rng(seed).standard_normal((LENGTH, DIM)) for seed in seeds])
    mask = np.arange(LENGTH) >= np.array([len(text) % LENGTH for text in texts])[:, None]
    return Captions((features * mask[:, :, None]).astype(np.float32), mask)


@pytest.fixture
def encoder(monkeypatch):
    reader = types.SimpleNamespace(encode=features_of, fingerprint="random")
    monkeypatch.setattr(artifacts, "open_text_reader", lambda config, workdir, model: reader)
    monkeypatch.setattr(artifacts, "check_text_encoder", lambda *_: None)


def save_random(file, network, family):
    """A file with the authors' key names and random parameters."""
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: (random.standard_normal(leaf.shape) * 0.3).astype(leaf.dtype), family.shapes(network)
    )
    safetensors_file.save(file, params, family.layout.torch_name)
    return str(file)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Files of a tokenizer and of a generator that takes captions."""
    folder, config = tmp_path_factory.mktemp("networks"), text_config()
    tokenizer, generator = toy.tokenizer(config), toy.generator(config)
    return (
        save_random(folder / "tokenizer.safetensors", tokenizer, tokenizers.family_of(tokenizer)),
        save_random(folder / "generator.safetensors", generator, generators.family_of(generator)),
    )


def text_config(**sample):
    config = toy.llamagen_config(condition="text", caption_length=LENGTH, caption_dim=DIM)
    config.sample.update({"guidance": "constant", "guidance_scale": 2.0, "batch_size": 4} | sample)
    return config


@pytest.fixture
def experiment(networks):
    """The toy experiment that draws from captions, with settings of its sampling."""

    def make(**sample):
        config = text_config(**sample)
        config.tokenizer_from, config.init_from = networks
        return config

    return make


def draw_set(config, workdir):
    jobs.JOBS["sample"].check(config, workdir, ())
    jobs.JOBS["sample"].run(config, workdir)
    with np.load(workdir / "samples.npz") as file:
        return file["arr_0"], file["labels"], json.loads((workdir / "samples.json").read_text())


def test_sampling_by_prompt(experiment, encoder, tmp_path):
    file = write(tmp_path / "evaluation_metadata.jsonl", METADATA)
    config = experiment(prompts=str(file), images_per_prompt=2, geneval=True, png_folder=True)
    images, labels, recipe = draw_set(config, tmp_path)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(np.unique(images.reshape(6, -1), axis=0)) > 2
    assert recipe["num_images"] == 6
    assert recipe["labels"] == "prompt by prompt, 2 images of each"
    assert read_prompts(tmp_path / "prompts.jsonl") == read_prompts(file)
    names = [f"000{i}_a-{colour}-dog_0{j}.png" for i, colour in enumerate(("red", "green", "blue")) for j in range(2)]
    assert sorted(one.name for one in (tmp_path / "samples").iterdir()) == names
    stored = [Image.open(tmp_path / "samples" / name) for name in names]
    np.testing.assert_array_equal(np.stack(stored), images)
    for_scorer = [Image.open(tmp_path / "geneval" / f"0000{i}" / "samples" / "0000.png") for i in range(3)]
    np.testing.assert_array_equal(np.stack(for_scorer), images[::2])
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size == (240 + 64 + 1 + 64, 3 * 64 + 2 * 2)

    stamp = (tmp_path / "samples.npz").stat().st_mtime_ns
    (tmp_path / "geneval" / "00001" / "samples" / "0001.png").unlink()
    draw_set(config, tmp_path)
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == stamp  # done already
    with Image.open(tmp_path / "geneval" / "00001" / "samples" / "0001.png") as again:
        np.testing.assert_array_equal(np.asarray(again), images[3])
    write(file, METADATA.replace("green", "grey"))
    changed, _, other = draw_set(config, tmp_path)
    assert other["prompts"] != recipe["prompts"]
    np.testing.assert_array_equal(changed[[0, 1, 4, 5]], images[[0, 1, 4, 5]])  # each has its own random numbers


@pytest.mark.slow
def test_a_prompt_draws_what_its_features_in_a_file_draw(experiment, encoder, tmp_path):
    texts = ["a dog", "a cat", "a photo of a cow"]
    file = write(tmp_path / "prompts.txt", "\n".join(texts))
    (tmp_path / "prompts").mkdir()
    by_prompt, labels, _ = draw_set(experiment(prompts=str(file), images_per_prompt=1), tmp_path / "prompts")
    assert labels.tolist() == [0, 1, 2]
    features, mask = features_of(texts)
    np.savez(tmp_path / "captions.npz", features=features, mask=mask)
    config = experiment(captions=str(tmp_path / "captions.npz"), num_images=3)
    by_caption, _, recipe = draw_set(config, tmp_path)
    np.testing.assert_array_equal(by_prompt, by_caption)
    assert recipe["labels"] == "balanced: index modulo the number of captions"
    assert "prompts" not in recipe
    assert not (tmp_path / "prompts.jsonl").exists()


def test_one_prompt_is_drawn_as_often_as_is_asked(encoder, tmp_path):
    config = text_config(prompt="a red dog", images_per_prompt=3)
    model = toy.generator(config)
    conditions = of_sampling.open_conditions(config, tmp_path, model)
    found = conditions.look_up(np.array([0, 0]))
    np.testing.assert_array_equal(found.features, features_of(["a red dog"] * 2).features)
    assert conditions.labels.tolist() == [0, 0, 0]
    assert of_sampling.num_images(config, model) == 3


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"prompt": "a dog"}, "config.text.encoder = '': name the file or folder of T5"),
        ({"prompt": "a dog", "captions": "c.npz"}, "config.sample.captions and config.sample.prompt are both set"),
        ({"prompt": "a dog", "geneval": True}, "config.sample.geneval needs config.sample.prompts"),
        ({"prompt": "a dog", "hpsv2": True}, "config.sample.hpsv2 needs config.sample.prompts"),
        ({"prompts": "FILE", "prompt": "a dog"}, "are both set"),
        ({"prompts": "none.txt"}, "There is no file of prompts none.txt"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_refused(experiment, tmp_path, sample, message):
    with pytest.raises(RearError, match=re.escape(message)) as refused:
        jobs.JOBS["sample"].check(experiment(**sample), tmp_path, ())
    assert "\n" not in str(refused.value)


def test_prompts_need_an_encoder(experiment, tmp_path):
    with pytest.raises(RearError, match=r"config.text.encoder = '': name the file or folder"):
        jobs.JOBS["sample"].run(experiment(prompt="a dog"), tmp_path)


def test_geneval_without_its_metadata_is_refused_before_drawing(experiment, encoder, tmp_path):
    config = experiment(prompts=str(write(tmp_path / "a.txt", "a dog")), geneval=True)
    with pytest.raises(RearError, match=r"line 1 is no line of GenEval"):
        jobs.JOBS["sample"].check(config, tmp_path, ())


@pytest.mark.slow
def test_hpsv2_takes_the_first_image_of_each_prompt(experiment, encoder, tmp_path):
    write(tmp_path / "photo.json", '["a dog", "a cat"]')
    config = experiment(prompts=str(tmp_path), images_per_prompt=2, hpsv2=True)
    images, _, _ = draw_set(config, tmp_path)
    for file, image in zip(("00000.jpg", "00001.jpg"), images[::2], strict=True):
        Image.fromarray(image).save(tmp_path / "expected.jpg")
        assert (tmp_path / "hpsv2" / "photo" / file).read_bytes() == (tmp_path / "expected.jpg").read_bytes()
    config.sample.prompts = str(write(tmp_path / "a.txt", "a dog"))
    with pytest.raises(RearError, match=r"prompt 1 \('a dog'\) is of no style of HPSv2"):
        jobs.JOBS["sample"].check(config, tmp_path, ())


def test_a_generator_of_classes_takes_no_prompts(tmp_path):
    config = toy.config(sample__prompt="a dog")
    for step in (of_sampling.open_conditions, of_sampling.check_conditions):
        with pytest.raises(RearError, match=r"config.sample.prompt is set, and this generator takes classes"):
            step(config, tmp_path, toy.generator(config))


def test_labels_of_classes_stay_balanced():
    config = toy.config()
    assert of_sampling.num_images(config, toy.generator(config)) == 24
    np.testing.assert_array_equal(of_sampling.labels_of_classes(config), np.arange(24) % 10)


def test_the_plan_of_prompts_has_their_batches(tmp_path):
    config = text_config(prompts=str(write(tmp_path / "a.txt", "a dog\na cat\na cow")), batch_size=8)
    program = programs.sample(config, make_mesh(config.mesh))
    _, _, conditions, rows, _ = program.arguments
    assert conditions.features.shape == (2, LENGTH, DIM)  # 4 images of each
    assert rows.shape == (8,)
