"""A small Janus from its published files: prompts, images, VA-π, going on, export, on one device and on eight."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from rear_jax import jobs
from rear_jax.errors import RearError
from rear_jax.text.janus_vocabulary import JanusVocabulary
from rear_jax.weights import torch_writer
from rear_jax.weights.shards import open_weights
from tests import toy, toy_janus
from tests.test_janus_vocabulary import tokenizer_json

ROOM = 96  # tokens: the toy vocabulary has few words
ON_EIGHT = """
import json, pathlib, sys
from rear_jax import jobs
from tests import test_janus_jobs
place, workdir = map(pathlib.Path, sys.argv[1:])
config = test_janus_jobs.experiment(place, **json.loads(sys.stdin.read()))
test_janus_jobs.run(config, workdir, "posttrain", "sample")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A hub's folder: all networks of the model in one file, and its vocabulary."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "config.json").write_text("{}")
    tensors = toy_janus.tensors(settings(folder))
    torch_writer.write(folder / "pytorch_model.bin", tensors, tensors.values())
    return folder


def settings(folder):
    """The toy networks, with the vocabulary in a folder."""
    vocabulary = JanusVocabulary(folder)
    made = toy_janus.config(
        model__vocabulary_size=vocabulary.size, model__pad_id=vocabulary.pad_id, model__prompt_length=ROOM
    )
    made.data.source = "fashion_captions"
    return made


def experiment(folder, **changes):
    """VA-π on the files of a folder, then images of held-out captions."""
    made = settings(folder)
    made.tokenizer_from = made.init_from = str(folder)
    made.text.vocabulary = str(folder / "tokenizer.json")
    made.posttrain.update(perceptual_network="lite0", group=2, images_at_once=8, noise_rate=0.95, label_drop=0.0)
    made.posttrain.reward.perceptual = 0.0
    made.posttrain.loop.update(steps=3, batch_size=8, checkpoint_every=1, log_every=1, picture_every=0)
    made.posttrain.optimizer.learning_rate = 1e-2
    made.sample.update(stage="posttrain", num_images=16, batch_size=8, guidance="constant", guidance_scale=5.0)
    made.update_from_flattened_dict(changes)
    return made


def run(config, workdir, *names):
    jobs.check_all(names, config, workdir)
    for name in names:
        jobs.JOBS[name].run(config, workdir)


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workdir")
    run(experiment(place), workdir, "posttrain", "sample")
    return workdir


@pytest.fixture
def workdir(done, tmp_path):
    return shutil.copytree(done, tmp_path / "workdir")


def rewards(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines if line["job"] == "posttrain"]


def images_of(workdir):
    with np.load(workdir / "samples.npz") as file:
        return file["arr_0"]


@pytest.mark.slow
def test_training_goes_on_bit_for_bit(workdir, place):
    wanted = toy.saved_state(workdir / "posttrained")
    shutil.rmtree(workdir / "posttrained" / "3")
    run(experiment(place), workdir, "posttrain")
    for one, other in zip(wanted, toy.saved_state(workdir / "posttrained"), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_eight_devices_give_the_same_numbers(place, tmp_path):
    changes = {"posttrain.accumulation": 1, "model.remat": "none", "model.unroll": 1}
    (tmp_path / "one").mkdir()
    run(experiment(place, **changes), tmp_path / "one", "posttrain", "sample")
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT, str(place), str(tmp_path / "eight")],
        env=toy.environment(devices=8),
        cwd=toy.ROOT,
        input=json.dumps(changes | {"mesh.data": 2, "mesh.fsdp": 4}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(rewards(tmp_path / "eight"), rewards(tmp_path / "one"), rtol=1e-4)
    one, eight = images_of(tmp_path / "one"), images_of(tmp_path / "eight")
    assert (np.abs(one.astype(int) - eight) > 1).mean() < 0.01


@pytest.mark.slow
def test_a_trained_generator_goes_back_onto_the_file(workdir, place):
    file = workdir / "mine.bin"
    changes = {"convert.source": workdir / "posttrained", "convert.export": file, "convert.onto": place}
    run(experiment(place, **{name: str(value) for name, value in changes.items()}), workdir, "convert")
    found, before = open_weights(file), open_weights(place)
    changed = {key for key in before if found[key].tobytes() != before[key].tobytes()}
    assert changed >= {"gen_head.vision_head.weight", "gen_embed.weight"}
    assert not any(key.startswith(("gen_vision_model.", "vision_model.", "aligner.")) for key in changed)
    assert not any("lm_head" in key for key in changed)
    again = experiment(place, **{"init_from": str(file), "sample.stage": "train"})
    run(again, workdir / "again", "sample")
    wanted, drawn = images_of(workdir).astype(int), images_of(workdir / "again")
    assert (np.abs(wanted - drawn) > 8).mean() < 0.2  # from weights in bfloat16


@pytest.mark.slow
def test_prompts_of_geneval(workdir, place):
    dog = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    lines = [json.dumps(dog | {"prompt": f"a {colour} dog"}) for colour in ("red", "blue")]
    (workdir / "prompts.jsonl").write_text("\n".join(lines))
    changes = {"sample.prompts": str(workdir / "prompts.jsonl"), "sample.images_per_prompt": 3, "sample.geneval": True}
    run(experiment(place, **changes), workdir, "sample")
    assert len(images_of(workdir)) == 6
    assert json.loads((workdir / "geneval" / "00001" / "metadata.jsonl").read_text()) == json.loads(lines[1])
    assert (workdir / "geneval" / "00001" / "samples" / "0002.png").is_file()


@pytest.mark.slow
def test_it_is_diagnosed(workdir, place):
    config = experiment(place, **{"analyze.num_images": 16, "analyze.batch_size": 8})
    config.analyze.diagnostics = ("accuracy", "cka")
    run(config, workdir, "analyze")
    assert set(json.loads((workdir / "analyze.json").read_text())["diagnostics"]) == {"accuracy", "cka"}


@pytest.mark.slow
def test_a_generator_is_trained_from_captions(place, tmp_path):
    config = experiment(place, **{"codes.on_the_fly": True, "train.loop.steps": 2, "method.label_drop": 0.5})
    run(config, tmp_path, "train")
    assert (tmp_path / "generator").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text.vocabulary": ""}, "config.text.vocabulary = '': name the tokenizer.json that was published"),
        ({"text.vocabulary": "none.json"}, "There is no vocabulary none.json"),
        ({"model.pad_id": 3}, r"pads with \d+, the generator knows \d+ .* and pads with 3"),
        (
            {"sample.prompt": "dogs " * 200},
            "The prompt 'dogs dogs .* tokens with its template, and there is room for 96",
        ),
        ({"sample.captions": "c.npz"}, "config.sample.captions has features, and this generator reads text"),
        ({"data.source": "fashion_mnist"}, "There are no prompts: set config.sample.prompts"),
        ({"text.length": 97}, r"has room for 1 to 96 tokens \(config.model.prompt_length\)"),
        ({"model.width": 32}, r"width 16 \(config: 32\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused_first(place, tmp_path, changes, message):
    with pytest.raises(RearError, match=message) as refused:
        jobs.JOBS["sample"].check(experiment(place, **{"sample.stage": "train"} | changes), tmp_path, ())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("job", "changes", "message"),
    [
        ("posttrain", {"captions_from": "x"}, "config.captions_from = 'x' is not read by config.model.name = 'janus'"),
        ("posttrain", {"data.source": "fashion_mnist"}, "fashion_mnist .* has no captions"),
        ("caption", {}, "reads text itself: leave the job out"),
    ],
)
def test_what_cannot_be_trained_is_refused_first(place, tmp_path, job, changes, message):
    with pytest.raises(RearError, match=message):
        jobs.JOBS[job].check(experiment(place, **changes), tmp_path, ())


def test_captions_that_are_too_long_are_cut_in_training(place):
    vocabulary = JanusVocabulary(place)
    ids, mask = vocabulary.encode(["a red dog " * 40, "a dog"], ROOM, cut=True)
    assert mask[0].all()
    assert ids[0, 0] == vocabulary.start_id
    template = vocabulary.prompt("")
    assert ids[0, -5:].tolist() == template[-5:]
    assert ids[1][mask[1]].tolist() == vocabulary.prompt("a dog")
