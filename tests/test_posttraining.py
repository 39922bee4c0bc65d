"""The baselines of VA-π, the rewards, and post-training on captions."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rear_jax import generators, jobs, losses, tokenizers
from rear_jax.data.sources import open_source
from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.sampling.generate import generate, sampler_of
from rear_jax.training import posttraining
from rear_jax.training.posttraining import ar_grpo, rewards, ste
from rear_jax.training.posttraining.teacher_forcing import Networks, bare_generator
from rear_jax.training.state import new_state
from tests import toy
from tests.test_configs import load

KEY = jax.random.key(0)
MSE_ONLY = {"posttrain__reward__perceptual": 0.0, "posttrain__loop__batch_size": 4, "posttrain__loop__steps": 3}
FREE = {
    "posttrain__method": "ar_grpo",
    "posttrain__reward__mse": 0.0,
    "posttrain__reward__class_probability": 1.0,
    "posttrain__probe_images": 60,
    "posttrain__prior_weight": 0.0,
    "posttrain__kl_weight": 0.01,
    "posttrain__group": 2,
}


def config(**changes):
    return toy.config(**{"method__name": "ar", **MSE_ONLY, **changes})


@pytest.fixture(scope="module")
def setting():
    """Networks with random parameters, frozen parameters and a batch."""
    made = config()
    tokenizer = tokenizers.build(made.tokenizer, 32)
    generator = bare_generator(made, tokenizer)
    images = jax.random.randint(KEY, (4, 32, 32, 3), 0, 256).astype(jnp.uint8)
    params = jax.jit(generator.init)(KEY, *generators.family_of(generator).example_inputs(generator))["params"]
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    frozen = {
        "tokenizer": jax.jit(tokenizer.init)(KEY, images / 255.0)["params"],
        "reference": params,
        "generator": params,
    }
    batch = {"image": images, "label": jnp.arange(4), "condition": jnp.arange(4), "index": jnp.array([7, 5, 3, 1])}
    return Networks(generator, tokenizer), frozen, batch


def bright(images, labels, seen):
    """Mean brightness: a reward of one's own."""
    return images.mean(axis=(1, 2, 3))


@pytest.fixture
def brightness(monkeypatch):
    """Settings under which the reward of one's own is the only one."""
    monkeypatch.setitem(rewards.REWARDS, "bright", bright)

    def made(**changes):
        result = config(**changes)
        with result.unlocked():
            result.posttrain.reward.mse = 0.0
            result.posttrain.reward.bright = 1.0
        return result

    return made


@pytest.mark.slow
def test_straight_through_is_hard_forward_and_soft_backward():
    logits, weights = jax.random.normal(KEY, (5, 7)), jax.random.normal(jax.random.key(1), (5, 7))
    hard, gradient = jax.value_and_grad(lambda x: jnp.sum(weights * ste.straight_through(x, 0.5)))(logits)
    assert hard == pytest.approx(float(weights[jnp.arange(5), logits.argmax(-1)].sum()), rel=1e-5)
    soft = jax.grad(lambda x: jnp.sum(weights * jax.nn.softmax(x / 0.5)))(logits)
    np.testing.assert_allclose(gradient, soft, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(ste.straight_through(logits, 0.5), np.eye(7)[logits.argmax(-1)])


@pytest.mark.slow
def test_ste_rewards_the_images_of_the_most_probable_codes(setting):
    networks, frozen, batch = setting
    logits = jax.random.normal(KEY, (4, 16, 16))
    reward, _ = ste.reconstruction(networks, config().posttrain, frozen, logits, batch)
    decoded = networks.tokenizer.apply({"params": frozen["tokenizer"]}, logits.argmax(-1), method="decode")
    np.testing.assert_allclose(reward, -4 * losses.mean_squared_error(decoded, batch["image"] / 255.0), rtol=1e-5)


def test_ste_decodes_the_codes_vectors_to_the_last_digit(setting):
    """Wherever it runs: by default, accelerators round what goes into a product to a few digits."""
    networks, frozen, batch = setting
    made, logits = config().posttrain, jnp.zeros((4, 16, 16))
    program = jax.make_jaxpr(lambda logits: ste.reconstruction(networks, made, frozen, logits, batch))(logits)
    assert "Precision.HIGHEST" in str(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ste", "tokenizer"])
def test_descent_raises_the_reward(setting, name):
    networks, frozen, batch = setting
    method, optimizer = posttraining.METHODS[name], optax.adam(3e-2 if name == "ste" else 1e-2)
    step = jax.jit(
        method.make_step(networks, config(posttrain__prior_weight=0.0, posttrain__accumulation=2), optimizer)
    )
    learns = frozen["generator"] if name == "ste" else {"decoder": frozen["tokenizer"]["decoder"]}
    state, seen = new_state(learns, optimizer), []
    for n in range(20):
        state, metrics = step(state, batch, jax.random.key(n), frozen)
        seen.append(float(metrics["reward"]))
    assert np.mean(seen[-5:]) > np.mean(seen[:5])
    assert metrics["suspect"] == -1


@pytest.mark.parametrize("name", ["ste", "tokenizer"])
def test_a_reward_of_ones_own_has_a_gradient(setting, brightness, name):
    networks, frozen, batch = setting
    method, optimizer = posttraining.METHODS[name], optax.sgd(1.0)
    step = jax.jit(method.make_step(networks, brightness(posttrain__prior_weight=0.0), optimizer))
    learns = frozen["generator"] if name == "ste" else {"decoder": frozen["tokenizer"]["decoder"]}
    _, metrics = step(new_state(learns, optimizer), batch, KEY, frozen)
    assert metrics["gradient_norm"] > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ar_grpo_scores_what_it_drew_with(setting, scale):
    """Its log-probabilities are those of the guided, tempered logits that the sampler draws from, code by code."""
    networks, frozen, batch = setting
    made = config(**{**FREE, "sample__guidance_scale": scale, "sample__temperature": 1.3})
    params = frozen["generator"]
    samples = ar_grpo.draw_samples(networks, made, params, frozen, batch, KEY)
    assert samples.shape == (4, 2, 16)
    keys, rows = jax.random.split(KEY, 8), jnp.repeat(jnp.arange(4), 2)
    codes, logits = generate(
        generators.cached(networks.generator),
        params,
        batch["condition"],
        rows,
        keys,
        sampler_of(made.sample),
        return_logits=True,
    )
    np.testing.assert_array_equal(codes.reshape(4, 2, 16), samples)
    wanted = -losses.next_code_cross_entropy(logits / 1.3, codes).reshape(4, 2, 16)
    found = ar_grpo.log_probabilities(networks, made, params, batch["condition"], samples)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


@pytest.mark.slow
def test_ar_grpo_learns_a_reward_of_ones_own(setting, brightness):
    networks, frozen, batch = setting
    made = brightness(
        posttrain__method="ar_grpo", posttrain__prior_weight=0.0, posttrain__kl_weight=1e-3, posttrain__inner_updates=2
    )
    optimizer = optax.adam(1e-2)
    step = jax.jit(ar_grpo.make_step(networks, made, optimizer))
    state, seen = new_state(frozen["generator"], optimizer), []
    for n in range(20):
        state, metrics = step(state, batch, jax.random.key(n), frozen)
        seen.append(float(metrics["reward_bright"]))
    assert np.mean(seen[-5:]) > np.mean(seen[:5])
    assert metrics["kl"] > 0.0


@pytest.mark.slow
def test_the_first_update_of_ar_grpo_is_on_policy(setting, brightness):
    networks, frozen, batch = setting
    made = brightness(posttrain__method="ar_grpo", posttrain__prior_weight=0.0, posttrain__kl_weight=0.1)
    optimizer = optax.sgd(1.0)
    step = jax.jit(ar_grpo.make_step(networks, made, optimizer))
    _, metrics = step(new_state(frozen["generator"], optimizer), batch, KEY, frozen)
    assert (metrics["ratio"], metrics["clip_share"], metrics["kl"]) == (1.0, 0.0, 0.0)


@pytest.mark.slow
def test_rewards_by_hand(setting):
    networks, frozen, batch = setting
    original, images = batch["image"][:1] / 255.0, batch["image"][1:3] / 255.0
    codes = jax.random.randint(KEY, (2, 16), 0, 16)
    seen = rewards.Seen(networks, frozen, codes, original)
    l1 = rewards.absolute_error(images, None, seen)
    np.testing.assert_allclose(l1, -2 * np.abs(images - original).mean(axis=(1, 2, 3)), rtol=1e-5)
    cosine = rewards.codebook_cosine(images, None, seen)
    tokenizer, variables = networks.tokenizer, {"params": frozen["tokenizer"]}
    z = np.asarray(tokenizer.apply(variables, original, method="latents")).reshape(1, 16, -1)
    e = np.asarray(tokenizer.apply(variables, codes, method="embed"))
    norms = np.linalg.norm(z, axis=-1) * np.linalg.norm(e, axis=-1)
    np.testing.assert_allclose(cosine, ((z * e).sum(-1) / norms).mean(-1) - 1.0, rtol=1e-4)
    flattened = rewards.flattened_codebook_cosine(images, None, seen)
    z, e = z.reshape(1, -1), e.reshape(2, -1)
    norms = np.linalg.norm(z, axis=-1) * np.linalg.norm(e, axis=-1)
    np.testing.assert_allclose(flattened, (z * e).sum(-1) / norms - 1.0, rtol=1e-4)


@pytest.mark.slow
def test_a_reward_that_is_not_finite_names_its_image(setting, trained, tmp_path, monkeypatch):
    batch = setting[2]
    reward = jnp.zeros((4, 2)).at[2, 1].set(jnp.nan)
    assert rewards.first_not_finite(reward, batch) == 3
    assert rewards.first_not_finite(jnp.zeros((4, 2)), batch) == -1

    def broken(images, labels, seen):
        return jnp.where(labels == 1, jnp.nan, 0.0)

    monkeypatch.setitem(rewards.REWARDS, "l1", broken)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RearError, match=r"reward.* not finite at step \d, first for image (\d+) of the training") as e:
        toy.run(tmp_path, "posttrain", **{**MSE_ONLY, "posttrain__reward__l1": 1.0, "posttrain__loop__batch_size": 32})
    index = int(str(e.value).split("for image ")[1].split()[0])
    assert open_source("fashion_mnist", "", "test")[index][1] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posttrain__method": "ste", "posttrain__reward__codebook": 1.0}, "looks at codes.*class_probability"),
        ({"posttrain__method": "tokenizer", "posttrain__reward__codebook": 1.0}, "looks at codes"),
        ({"posttrain__method": "ste", "posttrain__kl_weight": 0.1}, "kl_weight = 0.1 has no effect .*'ste': leave it"),
        ({"posttrain__method": "tokenizer", "posttrain__inner_updates": 2}, "inner_updates = 2 has no effect"),
        ({**FREE, "posttrain__noise_rate": 0.5}, "noise_rate = 0.5 has no effect .*'ar_grpo'"),
        ({**FREE, "posttrain__reward__mse": 1.0}, "have no original|do not have"),
        ({**FREE, "posttrain__prior_weight": 0.1}, "prior_weight"),
        ({**FREE, "sample__top_k": 5}, "top_k"),
        ({**FREE, "posttrain__probe_images": 12}, "raise config.posttrain.probe_images|more real images"),
    ],
)
def test_refusals(trained, tmp_path, changes, message):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RearError, match=message):
        toy.run(tmp_path, "posttrain", **{**MSE_ONLY, **changes})


def test_an_unknown_reward_is_named(trained, tmp_path):
    made = config()
    with made.unlocked():
        made.posttrain.reward.beauty = 1.0
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RearError, match=r"reward\.beauty is no reward: use mse"):
        jobs.JOBS["posttrain"].run(made, tmp_path)


@pytest.mark.parametrize("changes", [{"posttrain__method": "ste"}, FREE], ids=["ste", "ar_grpo"])
@pytest.mark.slow
def test_the_job_trains_what_is_sampled(trained, tmp_path, changes):
    settings = {**MSE_ONLY, "posttrain__optimizer__learning_rate": 1e-2, **changes}
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    toy.run(tmp_path, "posttrain", "sample", sample__stage="posttrain", **settings)
    before, after = (np.load(folder / "samples.npz")["arr_0"] for folder in (trained, tmp_path))
    assert not np.array_equal(before, after)
    with pytest.raises(RearError, match=r"posttrain\.method \(was"):
        toy.run(tmp_path, "posttrain", **MSE_ONLY)


@pytest.mark.slow
def test_a_decoder_resumes_bit_for_bit_and_decodes_the_samples(trained, tmp_path):
    rate = {f"posttrain__optimizer__{name}": 1e-2 for name in ("learning_rate", "final_learning_rate")}
    learning = {**rate, "posttrain__loop__checkpoint_every": 1}  # a constant rate: a cosine knows how many steps follow
    settings = {**MSE_ONLY, **learning, "posttrain__method": "tokenizer"}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        shutil.copytree(trained, folder)
    toy.run(whole, "posttrain", "sample", sample__stage="posttrain", **settings)
    toy.run(halves, "posttrain", **{**settings, "posttrain__loop__steps": 2})
    toy.run(halves, "posttrain", "sample", sample__stage="posttrain", **settings)
    a, b, before = (np.load(folder / "samples.npz")["arr_0"] for folder in (whole, halves, trained))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, before)
    elsewhere = {"sample__stage": "posttrain", "tokenizer_from": str(trained / "tokenizer")}
    with pytest.raises(RearError, match="posttrained_decoder does not exist: run --job=posttrain"):
        toy.run(tmp_path, "sample", **settings, **elsewhere)


@pytest.mark.slow
def test_a_discriminator_that_came_with_the_tokenizer_rewards(tmp_path):
    made = {"tokenizer_training__discriminator_weight": 0.5, "tokenizer_training__discriminator_channels": 8}
    made |= {"tokenizer_training__discriminator_layers": 2, "method__name": "ar"}
    toy.run(tmp_path, "tokenizer", "tokenize", "train", **made)
    toy.run(tmp_path, "posttrain", **{**MSE_ONLY, **made, "posttrain__reward__discriminator": 0.1})
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "reward" in line][-1]  # after it come metrics of held-out images
    assert last["reward"] == pytest.approx(last["reward_mse"] + 0.1 * last["reward_discriminator"], rel=1e-5)


def captioned(tmp_path, **changes):
    """A text-conditional toy with one caption for each of the ten classes."""
    made = toy.llamagen_config(condition="text", caption_length=3, caption_dim=5)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "features.npy", rng.standard_normal((changes.pop("captions", 10), 3, 5)).astype(np.float32))
    np.save(tmp_path / "mask.npy", np.ones(np.load(tmp_path / "features.npy").shape[:2], bool))
    made.captions_from = str(tmp_path)
    made.posttrain.reward.perceptual = 0.0
    made.posttrain.loop.update(steps=2, batch_size=4)
    return made


@pytest.mark.slow
def test_captions_condition_post_training(trained, tmp_path):
    made = captioned(tmp_path)
    tokenizer = tokenizers.build(made.tokenizer, 32)
    generator = bare_generator(made, tokenizer)
    params = jax.jit(generator.init)(KEY, *generators.family_of(generator).example_inputs(generator))["params"]
    store = Checkpoints(tmp_path / "start", keep=1)
    store.save(0, new_state(params, optax.sgd(1.0)), made.to_dict())
    store.close()
    made.tokenizer_from, made.init_from = str(trained / "tokenizer"), str(tmp_path / "start")
    jobs.JOBS["posttrain"].run(made, tmp_path)
    assert (tmp_path / "posttrained" / "2").is_dir()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_split_needs_its_captions(trained, tmp_path, split):
    made = captioned(tmp_path, captions=9)
    images = np.zeros((9, 32, 32, 3), np.uint8)
    labels = {name: np.arange(9) + (name == split) for name in ("train", "validation")}
    arrays = {f"{name}_images": images for name in labels} | {f"{name}_labels": labels[name] for name in labels}
    np.savez(tmp_path / "pairs.npz", **arrays)
    made.data.update(source="arrays", path=str(tmp_path / "pairs.npz"), train_split="train", eval_split="validation")
    made.tokenizer_from = str(trained / "tokenizer")
    with pytest.raises(RearError, match=rf"\({split}\) has labels up to 9, .* an image's label is the number of its"):
        jobs.JOBS["posttrain"].run(made, tmp_path)


def test_the_readmes_ar_grpo_command_is_one():
    """Its flags, but for the files and the folder."""
    blocks = (toy.ROOT / "README.md").read_text().split("```")
    command = next(block for block in blocks if "posttrain.method=ar_grpo" in block)
    made = load(toy.ROOT / re.search(r"--config=(\S+)", command)[1])
    for name, value in re.findall(r"--config\.(posttrain\S+)=(\S+)", command):
        made.update_from_flattened_dict({name: value if name == "posttrain.method" else float(value)})
    generator = bare_generator(made, tokenizers.build(made.tokenizer, made.data.image_size))
    assert posttraining.checked_method(made, generator) is ar_grpo.METHOD
