"""CLIP and HPSv2 as rewards: what they give, what they need, and the job that post-trains with them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rear_jax import generators, jobs, tokenizers
from rear_jax.data.sources import open_split
from rear_jax.errors import RearError
from rear_jax.metrics.text_scores import TextScorer
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.training import posttraining
from rear_jax.training.posttraining import judges, rewards, text_judge
from rear_jax.training.posttraining.teacher_forcing import bare_generator
from rear_jax.training.state import new_state
from tests import toy
from tests.test_posttraining import captioned
from tests.test_text_scores import NETWORKS, files  # noqa: F401

KEY = jax.random.key(0)
SIZE = 2000  # captions of the embedded images


def rewarded(tmp_path, files, **weights):  # noqa: F811
    """A text-conditional toy on images with captions, and only these rewards."""
    made = captioned(tmp_path, captions=SIZE)
    made.data.source = "fashion_captions"
    made.clip.update(weights=files["clip"], vocabulary=files["words"])
    made.hps.weights = files["hps"]
    made.posttrain.reward.update(dict.fromkeys(made.posttrain.reward, 0.0) | weights)
    return made


@pytest.fixture
def both(tmp_path, files):  # noqa: F811
    """The toy with both rewards, and its judges."""
    made = rewarded(tmp_path, files, clip=1.0, hps=2.0)
    return made, judges.judges_of(made, tmp_path)


def batch_of(made, *, count: int = 4) -> dict:
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    features = text_judge.CaptionFeatures(text_judge.caption_scorers(made), open_split(made.data, "test")).of(
        np.arange(count)
    )
    return {"image": images, "label": jnp.arange(count), "index": jnp.arange(count), **features}


@pytest.mark.slow
def test_rewards_are_the_scores_of_the_decoded_images(both):
    made, asked = both
    batch = batch_of(made)
    tokenizer = tokenizers.build(made.tokenizer, 32)
    images = batch["image"] / np.float32(255)
    frozen = {"tokenizer": jax.jit(tokenizer.init)(KEY, images)["params"]}
    frozen |= {name: params for name, (_, params) in asked.items()}
    assert all(params.keys() == {"image"} for _, params in asked.values())
    networks = posttraining.networks_of(made, tokenizer, asked)
    samples = jax.random.randint(KEY, (4, 2, tokenizer.codes_per_image), 0, tokenizer.codebook_size)

    @jax.jit
    def run(frozen, samples, batch):
        decode = jax.vmap(lambda c: tokenizer.apply({"params": frozen["tokenizer"]}, c, method="decode"))
        return rewards.score(networks, made.posttrain, frozen, samples, batch), decode(samples)

    made.posttrain.clip_images = True
    captions = [open_split(made.data, "test").caption(number) for number in range(4)]
    (total, each), decoded = run(frozen, samples, batch)
    np.testing.assert_allclose(total, each["clip"] + 2 * each["hps"], rtol=1e-5)
    eight_bit = np.asarray(jnp.round(255 * jnp.clip(decoded, 0, 1))).astype(np.uint8)
    for name in ("clip", "hps"):
        scorer = text_judge.scorer(name, made)
        found = scorer.score(eight_bit[:, 1], captions)
        np.testing.assert_allclose(each[name][:, 1], found, atol=3e-3)  # 8 bits round
    assert np.std(each["clip"]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "hps"])
def test_they_have_a_gradient_in_the_images(both, name):
    judge, params = both[1][name]
    images, text = jax.random.uniform(KEY, (2, 20, 20, 3)), jax.random.normal(KEY, (8,))
    value, slope = jax.jit(jax.value_and_grad(lambda x, params: judge.fit(params, x, text).sum()))(images, params)
    direction = slope / jnp.linalg.norm(slope)
    step = 1e-2
    higher = judge.fit(params, images + step * direction, text).sum()
    assert 0.5 < (higher - value) / (step * jnp.linalg.norm(slope)) < 1.5


def test_plans_count_the_usual_networks_where_no_file_is_given(both, tmp_path):
    made, asked = both
    shapes = {name: jax.tree.map(np.shape, params) for name, (_, params) in asked.items()}
    assert {name: jax.tree.map(np.shape, params) for name, (_, params) in judges.judges_of(made).items()} == shapes
    made.clip.weights = made.hps.weights = ""
    planned = judges.judges_of(made)
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(params)) for name, (_, params) in planned.items()}
    assert {name: round(size / 1e6, 1) for name, size in sizes.items()} == {"clip": 87.8, "hps": 632.1}
    assert planned["hps"][0].caption_shape(3).shape == (3, 1024)


class TestRefusals:
    def test_of_generators_that_take_classes(self):
        made = toy.config(method__name="ar", posttrain__reward__clip=1.0, posttrain__reward__perceptual=0.0)
        generator = bare_generator(made, toy.tokenizer(made))
        with pytest.raises(RearError, match=r"reward\.clip asks for a caption, and this generator takes classes: set"):
            posttraining.checked_method(made, generator)

    @pytest.mark.parametrize(
        ("name", "option"), [("clip", "clip.weights"), ("clip", "clip.vocabulary"), ("hps", "hps.weights")]
    )
    def test_of_files_that_are_not_given(self, name, option, tmp_path, files):  # noqa: F811
        made = rewarded(tmp_path, files, **{name: 1.0})
        section, key = option.split(".")
        made[section][key] = ""
        with pytest.raises(RearError, match=rf"reward\.{name} needs config\.{option}: give"):
            judges.check_judges(made, tmp_path, ())

    def test_of_another_network(self, tmp_path, files):  # noqa: F811
        made = rewarded(tmp_path, files, hps=1.0)
        made.hps.weights = files["clip"]
        with pytest.raises(RearError, match=r"HPSv2 is a ViT-H-14"):
            judges.check_judges(made, tmp_path, ())

    def test_of_sources_without_captions(self, tmp_path, files):  # noqa: F811
        source = open_split(toy.config().data, "test")
        scorers = text_judge.caption_scorers(rewarded(tmp_path, files, hps=1.0))
        with pytest.raises(RearError, match=r"reward\.hps needs the texts of captions, and fashion_mnist has none"):
            text_judge.CaptionFeatures(scorers, source)
        assert text_judge.CaptionFeatures({}, source).of(np.array([1])) == {}


@pytest.mark.slow
def test_features_of_a_caption_are_computed_once(both, monkeypatch):
    made, _ = both
    source, asked = open_split(made.data, "test"), []
    found = text_judge.CaptionFeatures(text_judge.caption_scorers(made), source)
    score = TextScorer.text_features
    monkeypatch.setattr(TextScorer, "text_features", lambda self, texts: asked.append(texts) or score(self, texts))
    first, again = (found.of(np.array(labels))["text_features"] for labels in ([5, 3, 5], [3, 7]))
    assert asked == [[source.caption(n) for n in of] for of in ([3, 5], [3, 5], [7], [7])]  # for either judge
    np.testing.assert_array_equal(first["clip"][[0, 1]], first["clip"][[2, 1]])
    np.testing.assert_array_equal(first["hps"][1], again["hps"][0])
    alone = text_judge.scorer("hps", made).text_features([source.caption(7)])
    np.testing.assert_allclose(again["hps"][1:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["va_pi", "ar_grpo", "ste"])
def test_the_job_learns_from_both(trained, tmp_path, files, method):  # noqa: F811
    made = rewarded(tmp_path, files, clip=1.0, hps=1.0)
    made.posttrain.method = method
    made.posttrain.prior_weight = 0.0 if method == "ar_grpo" else 0.1
    generator = bare_generator(made, tokenizers.build(made.tokenizer, 32))
    params = jax.jit(generator.init)(KEY, *generators.family_of(generator).example_inputs(generator))["params"]
    store = Checkpoints(tmp_path / "start", keep=1)
    store.save(0, new_state(params, optax.sgd(1.0)), made.to_dict())
    store.close()
    shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    made.init_from = str(tmp_path / "start")
    jobs.JOBS["posttrain"].check(made, tmp_path, ())
    jobs.JOBS["posttrain"].run(made, tmp_path)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "reward" in line][-1]
    assert last["reward"] == pytest.approx(last["reward_clip"] + last["reward_hps"], rel=1e-4)
    assert 0 < abs(last["reward_clip"]) < 1
    made.data.source = "fashion_mnist"
    with pytest.raises(RearError, match=r"needs the texts of captions"):
        jobs.JOBS["posttrain"].check(made, tmp_path, ())
