"""VA-π: the step against its G-fold form, what the first update must look like, and the job from start to samples."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from rear_jax import generators, grpo, losses, tokenizers
from rear_jax.errors import RearError
from rear_jax.runtime.writer import read_metrics
from rear_jax.training.posttraining import teacher_forcing, va_pi
from rear_jax.training.posttraining.rewards import score
from rear_jax.training.posttraining.teacher_forcing import Networks, bare_generator
from rear_jax.training.state import new_state
from tests import toy

MSE_ONLY = {"posttrain__reward__perceptual": 0.0, "posttrain__loop__batch_size": 4, "posttrain__loop__steps": 4}
KEY = jax.random.key(0)


def config(**changes):
    return toy.config(**{"method__name": "ar", **MSE_ONLY, **changes})


@pytest.fixture(scope="module")
def parts():
    """Networks with random parameters, a batch, and what the step keeps frozen."""
    made = config()
    tokenizer = tokenizers.build(made.tokenizer, 32)
    generator = bare_generator(made, tokenizer)
    images = jax.random.randint(KEY, (4, 32, 32, 3), 0, 256).astype(jnp.uint8)
    params = jax.jit(generator.init)(KEY, *generators.family_of(generator).example_inputs(generator))["params"]
    params = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    frozen = {"tokenizer": jax.jit(tokenizer.init)(KEY, images / 255.0)["params"], "reference": params}
    batch = {"image": images, "label": jnp.arange(4), "condition": jnp.arange(4), "index": jnp.array([7, 5, 3, 1])}
    return Networks(generator, tokenizer), params, frozen, batch


def run_step(parts, **changes):
    networks, params, frozen, batch = parts
    optimizer = optax.sgd(1.0)  # the update is the gradient
    step = jax.jit(va_pi.make_step(networks, config(**changes), optimizer))
    state, metrics = step(new_state(params, optimizer), batch, KEY, frozen)
    return state, jax.device_get(metrics)


def test_the_first_update_is_on_policy(parts):
    state, metrics = run_step(parts, posttrain__kl_weight=0.01)
    assert metrics["ratio"] == 1.0
    assert metrics["clip_share"] == 0.0
    assert metrics["kl"] == 0.0
    assert metrics["reward"] == metrics["reward_mse"] < 0.0
    assert 0.0 < metrics["entropy"] <= np.log(16)
    assert state.step == 1


@pytest.mark.slow
@jax.enable_x64(True)
def test_one_forward_pass_gives_loss_and_gradient_of_g(parts):
    """The released code runs every sample through the generator; here the context is run once.

    Parameters and products are float64; logits are float32 whatever they are made of.
    """
    networks, params, frozen, batch = parts
    made = config(model__dtype="float64")
    generator = bare_generator(made, networks.tokenizer)
    networks, params = networks._replace(generator=generator), jax.tree.map(lambda p: p.astype(jnp.float64), params)
    state, metrics = run_step((networks, params, frozen, batch))
    mine = jax.tree.map(lambda before, after: before - after, params, state.params)

    _, sample_key, drop_key = jax.random.split(KEY, 3)
    images = batch["image"].astype(jnp.float32) / 255.0
    codes = networks.tokenizer.apply({"params": frozen["tokenizer"]}, images, method="encode")
    group = made.posttrain.group
    logits = networks.generator.apply({"params": params}, codes, batch["label"]).logits
    samples = grpo.draw_groups(sample_key, logits, group)
    rewards, _ = score(networks, made.posttrain, frozen, samples, batch)
    advantages = grpo.group_advantages(rewards)

    def repeated(params):
        many = networks.generator.apply(
            {"params": params}, jnp.repeat(codes, group, axis=0), jnp.repeat(batch["label"], group)
        ).logits
        new = -losses.next_code_cross_entropy(many, samples.reshape(-1, codes.shape[1])).reshape(samples.shape)
        prior = 0.9 * jnp.mean(losses.next_code_cross_entropy(many, jnp.repeat(codes, group, axis=0)))
        row = jax.random.choice(drop_key, len(codes), (1,), replace=False)  # a tenth of four images, rounded up
        null = jnp.full(1, made.data.num_classes)
        dropped = networks.generator.apply({"params": params}, codes[row], null).logits
        prior += 0.1 * jnp.mean(losses.next_code_cross_entropy(dropped, codes[row]))
        return grpo.policy_terms(new, jax.lax.stop_gradient(new), advantages).loss + 0.1 * prior

    loss, theirs = jax.value_and_grad(repeated)(params)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    # the clip of the global norm does not take part: the optimiser here is plain descent
    difference = jax.tree.map(lambda a, b: a - b, mine, theirs)
    assert optax.tree.norm(difference) <= 1e-6 * optax.tree.norm(theirs)


@pytest.mark.slow
def test_rewards_are_those_of_decoded_images_whatever_is_decoded_together(parts):
    networks, _, frozen, batch = parts
    images = batch["image"].astype(jnp.float32) / 255.0
    samples = jax.random.randint(KEY, (4, 3, 16), 0, 16)
    one, _ = score(networks, config().posttrain, frozen, samples, batch)
    many, _ = score(networks, config(posttrain__images_at_once=3).posttrain, frozen, samples, batch)
    np.testing.assert_allclose(one, many, rtol=1e-5)
    decoded = networks.tokenizer.apply({"params": frozen["tokenizer"]}, samples[2], method="decode")
    assert decoded.min() < 0.0  # what lies outside [0, 1] is not clipped, it counts
    want = -np.mean((2 * np.asarray(decoded) - 2 * np.asarray(images[2])) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(one[2], want, rtol=1e-5)
    clipped, _ = score(networks, config(posttrain__clip_images=True).posttrain, frozen, samples, batch)
    want = -np.mean((2 * np.clip(decoded, 0, 1) - 2 * np.asarray(images[2])) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(clipped[2], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("share", "rows", "wanted"), [(0.1, 128, 16), (0.1, 4, 1), (0.5, 6, 4), (1.0, 6, 6), (0.01, 8, 1)]
)
def test_rows_of_the_unconditional_prior(share, rows, wanted):
    assert teacher_forcing.dropped_rows(share, rows) == wanted


@pytest.mark.slow
def test_label_drop_teaches_the_null_class_and_leaves_the_ratio_at_one(parts):
    """The null class is the last row of the embeddings; its gradient comes from the unconditional prior alone."""
    networks, params, frozen, batch = parts
    moved = {}
    for share in (0.0, 0.1, 1.0):
        optimizer = optax.sgd(1.0)
        step = jax.jit(va_pi.make_step(networks, config(posttrain__label_drop=share), optimizer))
        state, metrics = step(new_state(params, optimizer), batch, KEY, frozen)
        moved[share] = jnp.abs(state.params["embeddings"] - params["embeddings"])[-1].sum()
        assert (metrics["ratio"], metrics["clip_share"]) == (1.0, 0.0)
        assert ("prior_unconditional" in metrics) == (share > 0.0)
    assert moved[0.0] == 0.0 < moved[0.1] < moved[1.0]


@pytest.mark.slow
def test_the_prior_is_a_mixture(parts):
    """With a share of one it is the cross-entropy under the null label, of all images."""
    networks, params, frozen, batch = parts
    made = config(posttrain__label_drop=1.0).posttrain
    context = teacher_forcing.read_context(networks, made, frozen, batch, KEY)
    logits = teacher_forcing.predict(networks, params, context)
    found, terms = teacher_forcing.prior(networks, made, params, logits, context, KEY)
    null = jnp.full_like(batch["label"], networks.generator.num_classes)
    dropped = networks.generator.apply({"params": params}, context.noisy, null).logits
    wanted = float(jnp.mean(losses.next_code_cross_entropy(dropped, context.codes)))
    assert float(found) == pytest.approx(wanted, rel=1e-6)
    assert float(terms["prior"]) == pytest.approx(
        float(teacher_forcing.cross_entropy(networks, params, context)), rel=1e-6
    )
    half = config(posttrain__label_drop=0.5).posttrain
    found, terms = teacher_forcing.prior(networks, half, params, logits, context, KEY)
    assert found == pytest.approx(0.5 * terms["prior"] + 0.5 * terms["prior_unconditional"])
    assert abs(terms["prior_unconditional"] - terms["prior"]) > 1e-3


@pytest.mark.slow
def test_inner_updates_move_the_ratio_and_count_as_one_step(parts):
    networks, params, frozen, batch = parts
    optimizer = optax.sgd(0.05)
    step = jax.jit(va_pi.make_step(networks, config(posttrain__inner_updates=3, posttrain__kl_weight=0.01), optimizer))
    state, metrics = step(new_state(params, optimizer), batch, KEY, frozen)
    assert metrics["ratio"] != 1.0
    assert metrics["kl"] == 0.0  # of the first update, which starts from the reference
    assert metrics["last_kl"] > 0.0
    assert metrics["last_gradient_norm"] not in (0.0, metrics["gradient_norm"])
    assert state.step == 1


@pytest.mark.slow
def test_microbatches_keep_the_rollouts_with_their_images(parts):
    """Inner updates on merged microbatches: with no step taken the ratio must be 1 for every image."""
    networks, params, frozen, batch = parts
    optimizer = optax.sgd(0.0)
    made = config(posttrain__inner_updates=2, posttrain__accumulation=2)
    _, metrics = jax.jit(va_pi.make_step(networks, made, optimizer))(new_state(params, optimizer), batch, KEY, frozen)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)


def test_post_training_raises_the_reward(parts):
    networks, params, frozen, batch = parts
    made = config(posttrain__prior_weight=0.0)
    optimizer = optax.adam(1e-2)
    step = jax.jit(va_pi.make_step(networks, made, optimizer))
    state, rewards = new_state(params, optimizer), []
    for n in range(30):
        state, metrics = step(state, batch, jax.random.key(n), frozen)
        rewards.append(float(metrics["reward"]))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"posttrain__group": 1}, "at least 2 samples"),
        ({"posttrain__noise_reading": "mine"}, "released"),
        ({"posttrain__reward__mse": 0.0}, "is all 0"),
        ({"posttrain__method": "mine"}, "va_pi, ste, tokenizer, ar_grpo"),
        ({"posttrain__reward__discriminator": 1.0}, "has no discriminator"),
        ({"posttrain__reward__perceptual": 1.0}, "config.lpips.vgg16"),
        ({"posttrain__accumulation": 3}, "multiple of 3"),
        ({"sample__stage": "mine"}, "posttrain"),
        (
            {"sample__stage": "posttrain", "sample__use_ema": True},
            "config.sample.use_ema: --job=posttrain keeps no",
        ),
    ],
)
def test_refusals(trained, tmp_path, changes, message):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    job = "sample" if "sample__stage" in changes else "posttrain"
    with pytest.raises(RearError) as caught:
        toy.run(tmp_path, job, **{**MSE_ONLY, **changes})
    assert message in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [3, 16])
def test_the_job_runs_on_devices_over_which_its_picture_does_not_divide(trained, tmp_path, devices):
    """Eight held-out images, with the rewards of their samples; with a KL term, for which a generator is kept."""
    flags = ("reward.perceptual=0", "kl_weight=0.01", "loop.steps=2", f"loop.batch_size={2 * devices}")
    start = (f"--config.tokenizer_from={trained / 'tokenizer'}", f"--config.init_from={trained / 'generator'}")
    flags = (*(f"--config.posttrain.{flag}" for flag in flags), *start, "--config.posttrain.loop.picture_every=1")
    done = toy.finish(tmp_path, "--job=posttrain", *flags, devices=devices)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "posttrain.png") as picture:
        assert picture.height > 8 * 32
    assert (tmp_path / "posttrained" / "2").is_dir()


@pytest.mark.slow
def test_the_job_resumes_bit_for_bit_and_is_sampled(trained, tmp_path):
    """From a reAR generator with projectors, which post-training leaves behind."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    rate = {f"posttrain__optimizer__{name}": 1e-3 for name in ("learning_rate", "final_learning_rate")}
    settings = {**MSE_ONLY, **rate, "posttrain__loop__checkpoint_every": 2}  # a cosine knows how many steps follow
    for folder in (whole, halves):
        shutil.copytree(trained, folder)
        (folder / "samples.json").unlink()
    toy.run(whole, "posttrain", **settings)
    toy.run(halves, "posttrain", **{**settings, "posttrain__loop__steps": 2})
    toy.run(halves, "posttrain", **settings)
    for one, other in zip(*(toy.saved_state(folder / "posttrained") for folder in (whole, halves)), strict=True):
        np.testing.assert_array_equal(one, other)  # parameters and optimiser state
    for folder in (whole, halves):
        toy.run(folder, "sample", sample__stage="posttrain", **settings)
    a, b = (np.load(folder / "samples.npz")["arr_0"] for folder in (whole, halves))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, np.load(trained / "samples.npz")["arr_0"])
    assert (whole / "posttrain.png").exists()
    lines = [json.loads(line) for line in (halves / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["job"] == "posttrain"]
    assert steps == [1, 2, 3, 4]
    watched = [line for line in lines if line["job"] == "posttrain_held_out"]
    assert [line["step"] for line in watched] == [0, 2, 4]  # before, where it was interrupted, after
    assert all(line["cross_entropy"] > 0 and line["unconditional_cross_entropy"] > 0 for line in watched)


@pytest.mark.slow
def test_starting_from_a_published_file(trained, tmp_path):
    file = tmp_path / "generator.safetensors"
    toy.run(tmp_path, "convert", convert__source=str(trained / "generator"), convert__export=str(file))
    for name, given in (("file", {"init_from": str(file)}), ("folder", {"init_from": str(trained / "generator")})):
        (tmp_path / name).mkdir()
        toy.run(tmp_path / name, "posttrain", tokenizer_from=str(trained / "tokenizer"), **given, **MSE_ONLY)
    a, b = (read_metrics(tmp_path / name, "posttrain")[0] for name in ("file", "folder"))
    assert a["reward"] == b["reward"]


@pytest.mark.parametrize(("job", "changes"), [("posttrain", MSE_ONLY), ("train", {"codes__on_the_fly": True})])
def test_labels_that_do_not_fit_are_refused(trained, tmp_path, job, changes):
    with pytest.raises(RearError, match=r"has 10 classes, config\.data\.num_classes is 9"):
        toy.run(tmp_path, job, tokenizer_from=str(trained / "tokenizer"), data__num_classes=9, **changes)
