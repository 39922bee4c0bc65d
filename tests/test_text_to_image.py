"""From captions to images and scores, at toy size: every job, a prompt of one's own, resuming, another encoder."""

import json
import shutil

import numpy as np
import pytest

from rear_jax import jobs
from rear_jax.data.fashion_captions import claim_of
from rear_jax.data.prompts import read_prompts
from rear_jax.errors import RearError
from tests import toy

pytestmark = pytest.mark.slow
JOBS = ("tokenize", "caption", "train", "posttrain", "sample", "evaluate")


def experiment(trained, **changes):
    """Fashion-MNIST with captions, on the tokenizer of the trained workdir."""
    made = toy.llamagen_config(condition="text", caption_length=12, caption_dim=8)
    made.data.source = "fashion_captions"
    made.tokenizer_from = str(trained / "tokenizer")
    made.text.update(encoder="random", dtype="float32", depth=1, heads=1, mlp_width=16, vocabulary_size=64)
    made.text.batch_size = 500
    made.codes.augmentation = "center"
    made.posttrain.update(perceptual_network="lite0", group=2, images_at_once=8)
    made.posttrain.reward.perceptual = 0.0
    made.posttrain.loop.update(steps=2, batch_size=4, picture_every=0)
    made.sample.update(images_per_prompt=1, guidance="constant", stage="posttrain", num_images=60, batch_size=20)
    made.update_from_flattened_dict(changes)
    return made


def run(config, workdir, *names):
    for name in names:
        jobs.JOBS[name].check(config, workdir, ())
        jobs.JOBS[name].run(config, workdir)


@pytest.fixture(scope="module")
def done(trained, tmp_path_factory):
    """A workdir in which all jobs have run."""
    workdir = tmp_path_factory.mktemp("text")
    jobs.check_all(JOBS, experiment(trained), workdir)
    run(experiment(trained), workdir, *JOBS)
    return workdir


@pytest.fixture
def workdir(done, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(done, tmp_path / "workdir")


def images_of(workdir):
    with np.load(workdir / "samples.npz") as file:
        return file["arr_0"]


def test_captions_of_held_out_images_are_drawn_and_scored(done):
    prompts = read_prompts(done / "prompts.jsonl")
    assert len(prompts) == 60
    assert len({claim_of(prompt.text) for prompt in prompts}) > 20
    scores = json.loads((done / "scores.json").read_text())["scores"]
    samples, real = scores["samples"], scores["held-out real images (the floor)"]
    assert real["brightness_match"] > 0.7  # for the garment that the probe sees, which is not always the right one
    assert real["prompt_match"] > 5 * real["prompt_match_by_chance"]
    assert 0 <= samples["prompt_match"] <= samples["garment_match"] <= 1
    assert 0 < samples["prompt_match_by_chance"] < 0.1
    assert "class_accuracy" not in samples
    assert (
        "| prompt_match |" in (done / "report.md").read_text().replace("  ", " ")
        or "prompt_match" in (done / "report.md").read_text()
    )


def test_a_second_run_writes_nothing_again(done, trained):
    def times():
        files = (file for file in done.rglob("*") if file.is_file() and file.name != "prompts.jsonl")
        return {file: file.stat().st_mtime_ns for file in files}

    before = times()
    run(experiment(trained), done, "tokenize", "caption", "sample", "evaluate")
    assert before == times()


def test_a_prompt_of_ones_own(workdir, trained):
    config = experiment(trained, **{"sample.prompt": "a bright, wide bag", "sample.images_per_prompt": 3})
    run(config, workdir, "sample")
    assert len(images_of(workdir)) == 3
    assert [prompt.text for prompt in read_prompts(workdir / "prompts.jsonl")] == ["a bright, wide bag"]


def test_training_goes_on_bit_for_bit(workdir, trained):
    wanted = toy.saved_state(workdir / "generator")
    shutil.rmtree(workdir / "generator" / str(experiment(trained).train.loop.steps))
    run(experiment(trained), workdir, "train")
    for one, other in zip(wanted, toy.saved_state(workdir / "generator"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_features_of_another_encoder_are_refused(workdir, trained):
    shutil.rmtree(workdir / "text_encoder")
    config = experiment(trained, seed=1)
    with pytest.raises(RearError, match="was begun with encoder"):
        run(config, workdir, "caption")
    shutil.rmtree(workdir / "captions")
    run(config, workdir, "caption")
    for name in ("train", "posttrain", "sample"):
        with pytest.raises(RearError, match="was trained with features of text encoder"):
            run(experiment(trained), workdir, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "fashion_mnist"}, r"fashion_mnist \(test\) has no captions"),
        ({"text.length": 13}, "has room for 1 to 12 tokens"),
        ({"text.dtype": "float16"}, "float16"),
        ({"text.dtype": "abc"}, "does not compute in abc"),
        ({"text.encoder": "none.safetensors"}, "config.text.encoder = 'none.safetensors' does not exist"),
        ({"model.caption_dim": 9}, "was begun with dim 8, not 9"),
        ({"model.condition": "class"}, "takes classes"),
    ],
)
def test_what_cannot_be_encoded_is_refused_first(done, trained, changes, message):
    with pytest.raises(RearError, match=message) as refused:
        jobs.JOBS["caption"].check(experiment(trained, **changes), done, ())
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def encoded_in_steps(done, trained, tmp_path_factory):
    """A workdir in which the same jobs have run without features on disk."""
    workdir = tmp_path_factory.mktemp("on_the_fly")
    shutil.copytree(done / "codes", workdir / "codes")
    names = ("caption", "train", "posttrain")
    config = experiment(trained, **{"text.on_the_fly": True})
    jobs.check_all(names, config, workdir)
    run(config, workdir, *names)
    return workdir


def metrics_of(workdir, job):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["job"] == job]


@pytest.mark.parametrize("job", ["train", "posttrain", "posttrain_held_out"])
def test_steps_that_encode_captions_learn_the_same(encoded_in_steps, done, job):
    found, wanted = metrics_of(encoded_in_steps, job), metrics_of(done, job)
    assert len(found) == len(wanted) > 0
    names = ("loss", "gradient_norm") if job == "train" else ("cross_entropy", "prior")
    for one, other in zip(found, wanted, strict=True):
        for name in set(names) & set(other):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)
    assert not (encoded_in_steps / "captions").exists()


def test_such_steps_go_on_bit_for_bit(encoded_in_steps, trained, tmp_path):
    workdir = shutil.copytree(encoded_in_steps, tmp_path / "workdir")
    config = experiment(trained, **{"text.on_the_fly": True})
    wanted = toy.saved_state(workdir / "generator")
    shutil.rmtree(workdir / "generator" / str(config.train.loop.steps))
    run(config, workdir, "train")
    for one, other in zip(wanted, toy.saved_state(workdir / "generator"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_samples_know_the_encoder_of_such_steps(encoded_in_steps, trained, tmp_path):
    workdir = shutil.copytree(encoded_in_steps, tmp_path / "workdir")
    run(experiment(trained), workdir, "sample")
    shutil.rmtree(workdir / "text_encoder")
    run(experiment(trained, seed=1), workdir, "caption")
    with pytest.raises(RearError, match="was trained with features of text encoder"):
        run(experiment(trained), workdir, "sample")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.source": "fashion_mnist"}, r"fashion_mnist \(test\) has no captions"),
        ({"captions_from": "features"}, "config.captions_from = 'features' is not read with config.text.on_the_fly"),
        ({"text.encoder": ""}, "config.text.encoder = '': name the file or folder of T5"),
        ({"text.length": 13}, "has room for 1 to 12 tokens"),
        ({"model.caption_dim": 9}, "gives features of 8 numbers, the generator takes 9"),
    ],
)
@pytest.mark.parametrize("job", ["train", "posttrain"])
def test_what_steps_cannot_encode_is_refused_first(encoded_in_steps, trained, tmp_path, job, changes, message):
    shutil.copytree(encoded_in_steps / "text_encoder", tmp_path / "text_encoder")
    config = experiment(trained, **{"text.on_the_fly": True, "codes.on_the_fly": True} | changes)
    with pytest.raises(RearError, match=message) as refused:
        jobs.JOBS[job].check(config, tmp_path, ())
    assert "\n" not in str(refused.value)


def test_steps_that_encode_captions_need_their_encoder(done, trained, tmp_path):
    config = experiment(trained, **{"text.on_the_fly": True, "codes.on_the_fly": True})
    with pytest.raises(RearError, match=r"config.text.encoder = 'random' and .* is not there: run --job=caption"):
        jobs.JOBS["train"].check(config, tmp_path, ())
    jobs.JOBS["train"].check(config, tmp_path, ("caption",))


def test_diagnostics_take_the_captions_of_their_images(trained, workdir):
    config = experiment(trained)
    config.analyze.update(num_images=16, batch_size=8, noise_shares=(0.0,))
    config.analyze.diagnostics = ("accuracy", "cka", "consistency")
    run(config, workdir, "analyze")
    found = json.loads((workdir / "analyze.json").read_text())["diagnostics"]
    assert list(found) == ["accuracy", "cka", "consistency"]
    shutil.rmtree(workdir / "captions")
    with pytest.raises(RearError, match="run --job=caption first"):
        jobs.JOBS["analyze"].check(config, workdir, ())
