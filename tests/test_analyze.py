"""The diagnostics: forced decoding, hidden states, what each measures, and the job that writes them down."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import generators, losses, tokenizers
from rear_jax.artifacts import Generator, Tokenizer
from rear_jax.config import alitok_generator
from rear_jax.data.sources import open_split
from rear_jax.errors import RearError
from rear_jax.evaluation import diagnostics
from rear_jax.evaluation.diagnostics import accuracy, alignment, consistency, embeddings, exposure
from rear_jax.evaluation.diagnostics.subject import Subject
from rear_jax.evaluation.reconstructions import Reconstructions
from rear_jax.evaluation.reference import RealImages
from rear_jax.generators.interface import Captions
from rear_jax.jobs import analyze
from rear_jax.metrics import scores, statistics
from rear_jax.runtime.mesh import make_mesh
from rear_jax.sampling.generate import Given, Sampler, decode, generate
from tests import toy

KEYS = jax.random.split(jax.random.key(7), 3)
LABELS, ROWS = jnp.array([0, 4]), jnp.array([0, 1, 1])
SAMPLER = Sampler("constant", 2.0, guidance_interval=5)


def alitok_config():
    """The toy experiment with an AliTok generator."""
    made = toy.config(method__name="ar")
    made.unlock()
    made.model = alitok_generator()
    made.model.update(width=16, depth=2, heads=2, mlp_width=32, dtype="float32", prefix_tokens=7)
    return made


FAMILIES = {  # name -> its toy experiment
    "rear": toy.config,
    "ar": lambda: toy.config(method__name="ar"),
    "llamagen": toy.llamagen_config,
    "captions": lambda: toy.llamagen_config(condition="text", caption_length=3, caption_dim=5),
    "alitok": alitok_config,
}


def scrambled(model):
    """Parameters with nothing at zero, so that every one counts."""
    shapes = generators.shapes(model)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.0, 0.3, leaf.shape), jnp.float32), shapes)


def conditions_of(model):
    """Of two sequences."""
    if not generators.takes_captions(model):
        return LABELS
    rng = np.random.default_rng(1)
    return Captions(rng.normal(size=(2, 3, 5)).astype(np.float32), np.array([[False, True, True], [True] * 3]))


QUICK = ("rear",)
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=CASES)
def model_and_params(request):
    model = toy.generator(FAMILIES[request.param]())
    return model, scrambled(model)


@pytest.mark.slow
def test_forced_codes_take_the_place_of_draws(model_and_params):
    model, params = model_and_params
    conditions, cached = conditions_of(model), generators.cached(model)
    true = jax.random.randint(jax.random.key(1), (3, 16), 0, 16)
    arguments = (cached, params, conditions, ROWS, KEYS, SAMPLER)
    forced = jax.jit(lambda mask: decode(*arguments, given=Given(true, mask), segments=1))
    free = jax.jit(lambda: generate(*arguments, segments=1))()
    np.testing.assert_array_equal(forced(np.zeros((3, 16), bool)).codes, free)
    whole = forced(np.ones((3, 16), bool))
    np.testing.assert_array_equal(whole.codes, true)
    some = np.random.default_rng(0).random((3, 16)) < 0.5
    mixed = forced(some).codes
    np.testing.assert_array_equal(mixed[some], true[some])
    assert (mixed != true)[~some].any()

    logits = jax.jit(lambda conditions: model.apply({"params": params}, true, conditions).logits)
    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions)
    conditional, without = logits(of_rows), generators.family_of(model).unconditional(model, params, of_rows)
    guided = 2.0 * conditional - logits(without)
    guided = jnp.where(jnp.arange(16)[:, None] <= 6, guided, conditional)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(guided), true[..., None], -1)[..., 0]
    np.testing.assert_allclose(whole.surprise, -likelihood, atol=2e-3)


@pytest.mark.slow
def test_hidden_states_lie_where_codes_are_read(model_and_params):
    model, params = model_and_params
    of_rows = jax.tree.map(lambda leaf: leaf[ROWS], conditions_of(model))
    codes = jax.random.randint(jax.random.key(2), (3, 16), 0, 16)
    states = jax.jit(lambda codes: generators.hidden_states(model, params, codes, of_rows))
    before, after = states(codes), states(codes.at[:, 6].set((codes[:, 6] + 1) % 16))
    assert before.shape == (3, 3, 15, 16)  # of two layers, and the input
    np.testing.assert_array_equal(before[:, :, :6], after[:, :, :6])
    assert (jnp.abs(before - after)[:, :, 6].max(axis=-1) > 1e-4).all()
    fresh = jax.eval_shape(model.init, jax.random.key(0), *generators.family_of(model).example_inputs(model))
    assert "hidden" not in fresh


@pytest.mark.slow
def test_hidden_states_are_those_that_are_tapped():
    model = toy.generator(toy.config())
    params, codes = scrambled(model), jax.random.randint(jax.random.key(2), (3, 16), 0, 16)
    states = jax.jit(lambda: generators.hidden_states(model, params, codes, LABELS[ROWS]))()
    out = jax.jit(lambda: model.apply({"params": params}, codes, LABELS[ROWS]))()
    bound = model.bind({"params": params})
    np.testing.assert_allclose(bound.shallow_projector(states[1]), out.shallow[:, :-1], atol=1e-5)
    np.testing.assert_allclose(bound.deep_projector(states[2]), out.deep[:, 1:], atol=1e-5)


class Differences:
    """Stands in for `Quality`, whose networks take seconds: the mean squared difference of 8-bit images."""

    recipe = "none"

    def __init__(self):
        self.seen = []

    def of(self, name, originals, images):
        self.seen.append(images)
        return {"difference": float(np.square(np.float64(originals) - images).mean())}


def small(config):
    """A config whose diagnostics look at 16 images."""
    config.data.train_split = "train"
    config.analyze.update(num_images=16, batch_size=8, true_shares=(0.0, 0.5, 1.0), nearest_shares=(0.0, 1.0))
    config.analyze.noise_shares = (0.0, 0.1)
    return config


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Random networks of the LlamaGen family, which is quick to compile."""
    config = small(toy.llamagen_config())
    tokenizer = toy.tokenizer(config)
    rng = np.random.default_rng(3)
    draw = lambda leaf: jnp.asarray(rng.normal(0.0, 0.4, leaf.shape), jnp.float32)  # noqa: E731
    tokenizer = Tokenizer(tokenizer, jax.tree.map(draw, tokenizers.shapes(tokenizer)), "t", "t", "here")
    model = toy.generator(config)
    generator = Generator(model, scrambled(model), 1, "g")
    return Subject(config, tmp_path_factory.mktemp("subject"), generator, tokenizer, make_mesh(config.mesh))


def images_of(config):
    """The first 16 of the images that are evenly spread over the 2000 held-out ones."""
    source = open_split(config.data, "test")
    picked = [source[index] for index in range(0, 2000, 125)]
    return np.stack([np.broadcast_to(image, (*image.shape[:2], 3)) for image, _ in picked])


def test_exposure_goes_from_drawn_images_to_reconstructions(subject):
    quality = Differences()
    rows = exposure.measure(subject, quality)
    pictures = subject.pictures("held_out")
    assert [(row["true codes"], row["share of true codes"]) for row in rows] == [
        (order, share) for order in ("front-loaded", "interleaved") for share in (0.0, 0.5, 1.0)
    ]
    assert len(quality.seen) == 4  # none and all of the codes are the same set in both orders
    through = Reconstructions(subject.tokenizer, None)
    (whole,) = through.over([pictures.images])
    np.testing.assert_array_equal(quality.seen[2], whole)
    assert rows[2]["difference"] == rows[5]["difference"]
    assert (rows[2]["CTR"], rows[2]["CTR of drawn codes"], rows[2]["perplexity"]) == (1.0, None, None)
    assert rows[0]["CTR"] == rows[0]["CTR of drawn codes"] < 0.5
    for row in (rows[1], rows[4]):
        np.testing.assert_allclose(row["CTR"], 0.5 + 0.5 * row["CTR of drawn codes"])
    assert all(row["perplexity"] > 1.0 for row in (rows[0], rows[1], rows[4]))


@pytest.mark.slow
def test_wrong_predictions_become_the_nearest_wrong_codes(subject):
    quality = Differences()
    plain, nearest = embeddings.measure(subject, quality)
    assert plain["CTR"] == nearest["CTR"] < 1.0
    pictures = subject.pictures("held_out")
    apply, params = jax.jit(subject.network.apply), {"params": subject.weights.generator}
    logits = apply(params, pictures.codes, pictures.labels).logits
    assert plain["CTR"] == pytest.approx(float(losses.correct_codes(logits, pictures.codes).mean()))
    predicted = np.argmax(logits, axis=-1)
    np.testing.assert_array_equal(quality.seen[0], subject.decode("plain", pictures, predicted))
    assert (quality.seen[1] != quality.seen[0]).any()


def with_params(subject, **params):
    """The same networks with other parameters in the generator."""
    other = copy.copy(subject)
    other.weights = subject.weights._replace(generator=subject.weights.generator | params)
    return other


@pytest.mark.slow
def test_guessing_has_the_perplexity_of_the_codebook(subject):
    """With a head of zeros all codes are as probable, whatever the context."""
    head = jax.tree.map(jnp.zeros_like, subject.weights.generator["lm_head"])
    rows = accuracy.measure(with_params(subject, lm_head=head), None)
    assert [(row["images"], row["random context"]) for row in rows] == [
        (images, share) for images in ("train", "held-out") for share in (0.0, 0.1)
    ]
    np.testing.assert_allclose([row["perplexity"] for row in rows], 16.0, rtol=1e-5)


@pytest.mark.slow
def test_noise_replaces_its_share_of_the_context():
    codes = np.zeros((200, 50), np.int32)
    keys = jax.random.split(jax.random.key(0), 200)
    noisy = np.asarray(accuracy.with_noise(keys, codes, 0.1, 1000))
    assert abs((noisy != 0).mean() - 0.1) < 0.01
    np.testing.assert_array_equal(accuracy.with_noise(keys[7:8], codes[7:8], 0.1, 1000), noisy[7:8])
    np.testing.assert_array_equal(accuracy.with_noise(keys, codes, 0.0, 1000), codes)


@pytest.mark.slow
def test_an_input_layer_that_is_the_codebook_turned_has_a_cka_of_one(subject):
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))
    codebook = np.asarray(subject.tokenizer.codebook())
    turned = with_params(subject, code_embeddings=jnp.asarray(codebook @ basis[:4], jnp.float32))
    rows = alignment.measure(turned, None)
    assert [row["layer"] for row in rows] == [0, 1, 2]
    assert rows[0]["current code"] == pytest.approx(1.0, abs=1e-4)
    assert all(row["next code"] < 0.99 for row in rows)


@pytest.mark.parametrize("count", [5, 12])
def test_the_frechet_distance_of_few_features_is_that_of_their_moments(count):
    a, b = (np.random.default_rng(seed).normal(seed, 1.0 + seed, (count, 8)).astype(np.float32) for seed in (0, 1))
    wanted = statistics.frechet_distance(*map(scores.moments, (a, b[:-1])))
    assert statistics.frechet_distance_of(a, b[:-1]) == pytest.approx(wanted)
    assert statistics.frechet_distance_of(a, a) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(RearError, match="do not compare"):
        statistics.frechet_distance_of(a, b[:, 1:])


@pytest.mark.slow
def test_consistency_counts_the_codes_that_come_back(subject):
    whole, *parts = consistency.measure(subject, None)
    pictures = subject.pictures("held_out")
    again = subject.encode("again", subject.decode("decoded", pictures, pictures.codes))
    assert whole["codes of real images"] == pytest.approx((again == pictures.codes).mean())
    assert whole["gap"] == pytest.approx(whole["codes of real images"] - whole["drawn codes"])
    assert [part["codes"] for part in parts[:2]] == ["1 to 2", "3 to 4"]
    assert len(parts) == 8
    for name in ("codes of real images", "drawn codes"):
        assert np.mean([part[name] for part in parts]) == pytest.approx(whole[name])


def test_images_and_their_codes_are_those_of_the_split(subject):
    pictures = subject.pictures("held_out")
    np.testing.assert_array_equal(pictures.images, images_of(subject.config))
    assert pictures.codes.shape == (16, 16)
    assert pictures is subject.pictures("held_out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diagnostics": ("exposure", "ckaa")}, "unknown 'ckaa': use some of exposure, embeddings, accuracy, cka"),
        ({"num_images": 20}, "config.analyze.num_images = 20: choose a multiple of config.analyze.batch_size = 8"),
        ({"num_images": 0}, "config.analyze.num_images = 0: choose a multiple"),
        ({"batch_size": 0}, "config.analyze.batch_size = 0"),
        ({"num_images": 2008}, "num_images = 2008: the split 'test' of fashion_mnist has 2000 images"),
    ],
)
def test_refusals_name_the_setting(tmp_path, changes, message):
    config = small(toy.config())
    config.analyze.update(changes)
    with pytest.raises(RearError) as caught:
        analyze.check(config, tmp_path, ("tokenizer", "train"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def config(subject, monkeypatch):
    """The config of two quick diagnostics; the job finds the random networks of `subject` in every workdir."""
    made = subject.config.copy_and_resolve_references()
    made.analyze.diagnostics = ("accuracy", "cka")
    opened = copy.copy(subject)
    opened.config = made
    monkeypatch.setattr(analyze, "open_subject", lambda config, workdir: opened)
    return made


def written(workdir):
    return json.loads((workdir / "analyze.json").read_text())


@pytest.mark.slow
def test_the_job_writes_numbers_a_page_and_plots_and_does_nothing_twice(config, tmp_path, monkeypatch):
    analyze.run(config, tmp_path)
    first = written(tmp_path)
    assert list(first["diagnostics"]) == ["accuracy", "cka"]
    assert first["networks"]["generator_step"] == 1
    assert len(first["diagnostics"]["accuracy"]["rows"]) == 4
    page = (tmp_path / "analyze.md").read_text()
    for needed in ("| layer | current code | next code |", "analyze_cka.png", "analyze_accuracy.png", "generator_step"):
        assert needed in page
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.glob("analyze*")}
    assert len(stamps) == 5
    analyze.run(config, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("analyze*")} == stamps

    (tmp_path / "analyze_cka.png").unlink()
    config.analyze.noise_shares = (0.0, 0.2)  # of 'accuracy' alone
    done = diagnostics.DIAGNOSTICS["cka"]
    monkeypatch.setitem(diagnostics.DIAGNOSTICS, "cka", dataclasses.replace(done, measure=None))
    analyze.run(config, tmp_path)
    again = written(tmp_path)["diagnostics"]
    assert again["cka"] == first["diagnostics"]["cka"]
    assert [row["random context"] for row in again["accuracy"]["rows"]] == [0.0, 0.2, 0.0, 0.2]
    assert {file for file in stamps if file.stat().st_mtime_ns > stamps[file]} == stamps.keys()


@pytest.mark.slow
def test_an_interrupted_job_goes_on_and_other_networks_begin_anew(config, tmp_path, monkeypatch):
    kept, broken = diagnostics.DIAGNOSTICS["accuracy"], diagnostics.DIAGNOSTICS["cka"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(diagnostics.DIAGNOSTICS, "cka", dataclasses.replace(broken, measure=interrupted))
    with pytest.raises(KeyboardInterrupt):
        analyze.run(config, tmp_path)
    assert list(written(tmp_path)["diagnostics"]) == ["accuracy"]
    monkeypatch.setitem(diagnostics.DIAGNOSTICS, "accuracy", dataclasses.replace(kept, measure=interrupted))
    monkeypatch.setitem(diagnostics.DIAGNOSTICS, "cka", broken)
    analyze.run(config, tmp_path)
    assert list(written(tmp_path)["diagnostics"]) == ["accuracy", "cka"]
    file = tmp_path / "analyze.json"
    file.write_text(file.read_text().replace('"generator_step": 1', '"generator_step": 2'))
    with pytest.raises(KeyboardInterrupt):
        analyze.run(config, tmp_path)
    file.write_text("{")
    with pytest.raises(RearError, match=r"analyze.json cannot be read .* delete it"):
        analyze.run(config, tmp_path)


@pytest.mark.slow
def test_one_of_the_files_of_lpips_alone_is_refused(tmp_path):
    config = small(toy.config())
    config.lpips.vgg16 = "vgg16.pth"
    with pytest.raises(RearError, match=r"the LPIPS score needs the weights of LPIPS: give config\.lpips\.heads"):
        analyze.check(config, tmp_path, ("tokenizer", "train"))


def test_nothing_to_analyze_yet(tmp_path):
    config = small(toy.config())
    for refuse in (lambda: analyze.check(config, tmp_path, ()), lambda: analyze.run(config, tmp_path)):
        with pytest.raises(RearError, match="tokenizer does not exist: run --job=tokenizer first"):
            refuse()


@pytest.mark.slow
def test_all_diagnostics_on_one_device_and_on_several(trained, tmp_path):
    """Numbers of four devices, of which two divide the parameters, are those of one."""
    flags = ["--job=analyze", f"--config.tokenizer_from={trained / 'tokenizer'}", "--config.data.train_split=test"]
    flags += [f"--config.init_from={trained / 'generator'}", "--config.evaluate.network=lite0"]
    flags += ["--config.analyze.num_images=16", "--config.analyze.batch_size=8"]
    flags += ["--config.analyze.true_shares=(0.0, 0.5, 1.0)", "--config.analyze.nearest_shares=(0.0, 1.0)"]
    found = []
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        ran = toy.finish(workdir, *flags, f"--config.mesh.fsdp={min(devices, 2)}", devices=devices)
        assert ran.returncode == 0, ran.stderr
        assert len(list(workdir.glob("analyze_*.png"))) == 5
        found.append({name: one["rows"] for name, one in written(workdir)["diagnostics"].items()})
    one, several = found
    counts = {"exposure": 6, "embeddings": 2, "accuracy": 8, "cka": 3, "consistency": 9}
    assert {name: len(rows) for name, rows in one.items()} == counts
    for name, rows in one.items():
        for row, other in zip(rows, several[name], strict=True):
            for column, value in row.items():
                wanted = pytest.approx(value, rel=0.02, abs=0.02) if isinstance(value, float) else value
                assert other[column] == wanted, (name, column)


def test_training_images_are_some_of_those_that_the_generator_learned_from(trained):
    few = analyze.open_subject(toy.config(train__num_images=20, analyze__num_images=8, analyze__batch_size=8), trained)
    learned = RealImages(few.config.data, few.config.data.train_split, 20)
    seen = {learned[i][0].tobytes() for i in range(20)}
    assert {image.tobytes() for image in few.pictures("train").images} < seen
    assert few.describe("train") != few.describe("held_out")
