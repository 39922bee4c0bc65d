"""TiTok and AliTok: sizes, interface, order of the codes, and both stages of training."""

import importlib.util
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rear_jax import artifacts, jobs, tokenizers
from rear_jax import config as configs
from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Checkpoints
from rear_jax.runtime.sharding import decay_mask
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import vq
from tests import toy
from tests.toy_sequence import KINDS, section, tiny

IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
PUBLISHED = {  # millions of parameters, codes of an image, shape of the codebook
    "titok_s128:2": (83.7, 128, (4096, 12)),
    "titok_b64:2": (204.8, 64, (4096, 12)),
    "titok_l32:2": (641.1, 32, (4096, 12)),
    "titok_bl64_vq8k": (390.0, 64, (8192, 64)),
    "alitok:2": (389.9, 273, (4096, 32)),
}


def quick(function):
    """`jax.jit` for programs that run a few times: compiled in a third of the time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def recipe(name: str):
    """The config `tokenizer_<name>.py`, with its stage after a colon if it has any, as on the command line."""
    name, *stage = name.split(":")
    file = toy.ROOT / "configs" / f"tokenizer_{name}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*stage)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_sizes(name):
    millions, codes, codebook = PUBLISHED[name]
    config = recipe(name)
    tokenizer = tokenizers.build(config.tokenizer, config.data.image_size)
    shapes = tokenizers.shapes(tokenizer)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert count == pytest.approx(millions, abs=0.05)
    assert tokenizers.family_of(tokenizer).published_size(config.tokenizer)[1] == pytest.approx(count, abs=0.05)
    assert tokenizer.grid == (1, codes) == (1, tokenizer.codes_per_image)
    assert shapes["codebook"].shape == codebook


@pytest.mark.parametrize("name", ["titok_s128", "titok_b64", "titok_l32", "alitok"])
def test_recipes_know_two_stages(name):
    with pytest.raises(RearError, match="stages 1 and 2, not '3'"):
        recipe(f"{name}:3")
    first, second = (recipe(f"{name}:{stage}").tokenizer_training for stage in "12")
    assert (first.trained, second.trained) == ("all", "decoder")
    assert (first.objective, second.objective) == ("pixels" if name == "alitok" else "codes", "pixels")


def test_the_network_that_makes_pixels_itself_is_trained_in_one_stage():
    config = recipe("titok_bl64_vq8k")
    assert (config.tokenizer_training.objective, config.tokenizer_training.trained) == ("pixels", "all")
    assert (config.tokenizer.predicts, config.tokenizer.legacy_reshape) == ("pixels", False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_interface_is_consistent_with_itself(kind):
    tokenizer, params = tiny(kind)
    count, width = tokenizer.codes_per_image, tokenizer.embedding_dim

    @quick
    def run(params, images):
        def call(method, x):
            return tokenizer.apply({"params": params}, x, method=method)

        codes = call("encode", images)
        vectors = call("embed", codes)
        decoded = call("decode", codes), call("decode_embeddings", vectors)
        return call("latents", images), codes, vectors, decoded, tokenizer.apply({"params": params}, images)

    rows = run(params, IMAGES)[0].reshape(-1, width)[:10]  # latents themselves as codes: each is its own nearest
    params["codebook"][:10] = rows
    latents, codes, vectors, decoded, (reconstruction, quantized) = run(params, IMAGES)
    assert latents.shape == vectors.shape == (2, count, width)
    assert codes.shape == quantized.codes.shape == (2, count)
    np.testing.assert_array_equal(codes.reshape(-1)[:10], np.arange(10))
    np.testing.assert_array_equal(quantized.codes, codes)
    assert np.allclose(np.linalg.norm(vectors, axis=-1), 1.0, atol=1e-5) is tokenizer.l2_normalize
    assert reconstruction.shape == IMAGES.shape
    for images in decoded:
        np.testing.assert_allclose(images, reconstruction, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("codes", marks=pytest.mark.slow), "alitok"])
def test_training_reaches_every_parameter(kind):
    tokenizer, params = tiny(kind)

    @quick
    @jax.grad
    def gradient(params):
        reconstruction, quantized = tokenizer.apply({"params": params}, IMAGES)
        return jnp.mean(jnp.square(reconstruction - IMAGES)) + quantized.commitment_loss + quantized.codebook_loss

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert jnp.any(leaf != 0), jax.tree_util.keystr(path)


def test_a_causal_decoder_draws_each_patch_from_the_codes_up_to_its_own():
    for kind, causal in (("alitok", False), ("alitok_causal", True)):
        tokenizer, params = tiny(kind)
        changed = jnp.zeros((1, 19), int).at[0, 3 + 6].set(1)  # the prefix has 3 codes; patch 6 lies in row 1
        decode = quick(lambda c, t=tokenizer, p=params: t.apply({"params": p}, c, method="decode"))
        difference = np.abs(decode(jnp.zeros((1, 19), int)) - decode(changed))[0]
        patches = difference.reshape(4, 4, 4, 4, 3).max(axis=(1, 3, 4)).reshape(16)  # largest change in each
        assert (patches[:6] == 0).all() == causal
        assert (patches[6:] > 0).all()


def test_weight_decay_spares_tables_and_norms():
    tokenizer, params = tiny("codes")
    mask = decay_mask(params, tokenizers.family_of(tokenizer).parameters)
    decayed = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(mask) if leaf}
    assert decayed == {"kernel"}


def moved(before, after) -> dict[str, bool]:
    """Whether anything below each entry of a parameter tree differs."""
    return {
        part: any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before[part], after[part])))
        for part in before
    }


def settings_for(kind: str, **changes):
    """A config with the toy tokenizer and quick training without perception; keywords are of `tokenizer_training`."""
    config = toy.config(tokenizer=section(kind), data__image_size=16)
    vq_settings = config.tokenizer_training
    vq_settings.optimizer.update(learning_rate=3e-3, warmup_steps=0)
    vq_settings.loop.steps = 1000
    vq_settings.update(changes)
    return config


def train(config, networks, frozen, given, steps: int):
    """Parameters before and after some steps on one batch, and the metrics of each."""
    optimizer = vq.make_optimizer(config, vq.learning(config, networks, frozen, given).rules)
    state = quick(lambda given: vq.init_state(networks, config, optimizer, given))({"tokenizer": given})
    step = quick(vq.tokenizer_step(networks, config, optimizer))
    first, history = state.params, []
    for number in range(steps):
        batch = {"image": (255 * IMAGES).astype(jnp.uint8)}
        state, metrics = step(state, batch, jax.random.key(number), frozen)
        history.append(metrics)
    assert all(np.isfinite(value) for metrics in history for value in metrics.values())
    return first, state.params, history


@pytest.mark.slow
def test_the_first_stage_learns_the_proxys_codes_and_leaves_the_proxy_alone():
    config = settings_for("codes", objective="codes")
    proxy = tokenizers.build(toy.config(tokenizer__channel_mult=(1, 1, 1)).tokenizer, 16)
    rng = np.random.default_rng(1)
    proxy_params = jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(leaf.dtype), tokenizers.shapes(proxy)
    )
    networks = vq.Networks(tokenizers.build(config.tokenizer, 16), None, None, proxy)
    given = {"pixel_codebook": proxy_params["codebook"], "pixel_decoder": proxy_params["decoder"]}
    before, after, history = train(config, networks, {"proxy": proxy_params}, given, 60)
    assert history[0]["cross_entropy"] == pytest.approx(np.log(16), rel=0.1)
    assert history[-1]["cross_entropy"] < 0.5 * history[0]["cross_entropy"]
    assert history[-1]["correct"] > history[0]["correct"]
    assert moved(before["tokenizer"], after["tokenizer"]) == {
        "encoder": True,
        "codebook": True,
        "decoder": True,
        "pixel_codebook": False,
        "pixel_decoder": False,
    }
    chex.assert_trees_all_equal(after["tokenizer"]["pixel_decoder"], proxy_params["decoder"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["codes", "alitok"])
def test_the_second_stage_leaves_encoder_and_codebook_alone(kind):
    config = settings_for(kind, trained="decoder", discriminator_weight=0.1, commitment_weight=0.0, revive_below=0.9)
    networks = vq.Networks(tokenizers.build(config.tokenizer, 16), None, PatchDiscriminator(4, 1))
    before, after, history = train(config, networks, {"perceptual": None}, {}, 20)
    assert history[-1]["mse"] < history[0]["mse"]
    assert history[0]["adversarial_weight"] > 0
    parts = moved(before["tokenizer"], after["tokenizer"])
    assert {part for part, has_moved in parts.items() if not has_moved} == {"encoder", "codebook"}
    assert moved(before, after)["discriminator"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pixels", "alitok_causal"])
def test_one_stage_on_pixels_moves_everything(kind):
    config = settings_for(kind)
    networks = vq.Networks(tokenizers.build(config.tokenizer, 16), None, None)
    before, after, history = train(config, networks, {"perceptual": None}, {}, 20)
    assert history[-1]["mse"] < history[0]["mse"]
    assert all(moved(before["tokenizer"], after["tokenizer"]).values())


@pytest.mark.slow
def test_both_stages_as_jobs(trained, tmp_path):
    def run(stage, **changes):
        config = toy.config(tokenizer=section("codes", patch_size=8, proxy_channel_mult=(1, 1, 1, 1)), **changes)
        config.tokenizer_training.loop.update(steps=2, checkpoint_every=2, log_every=1)
        config.tokenizer_training.perceptual_weight = 0.0
        jobs.JOBS["tokenizer"].run(config, tmp_path / stage)
        return Checkpoints(tmp_path / stage / "tokenizer", keep=1), config

    proxy = str(trained / "tokenizer")
    run("first", tokenizer_training__objective="codes", tokenizer_training__proxy=proxy)
    _, config = run(
        "second",
        tokenizer_training__trained="decoder",
        tokenizer_training__init_from=str(tmp_path / "first" / "tokenizer"),
    )
    tokenizer = tokenizers.build(config.tokenizer, 32)
    maskgit = artifacts.load_tokenizer(toy.config(tokenizer_from=proxy), tmp_path).params
    places = (tmp_path / stage / "tokenizer" for stage in ("first", "second"))
    first, second = (artifacts.read_tokenizer(place, config, tokenizer) for place in places)
    chex.assert_trees_all_equal(first["pixel_decoder"], maskgit["decoder"])
    np.testing.assert_array_equal(first["pixel_codebook"], maskgit["codebook"])
    assert {part for part, has_moved in moved(first, second).items() if not has_moved} == {"encoder", "codebook"}
    assert (tmp_path / "second" / "reconstructions.png").exists()


@pytest.mark.slow
def test_a_new_decoder_on_an_encoder_that_is_trained_already(tmp_path):
    def run(stage, kind, **changes):
        config = toy.config(tokenizer=section(kind, patch_size=8), **changes)
        config.tokenizer_training.loop.update(steps=1, checkpoint_every=1, log_every=1)
        config.tokenizer_training.perceptual_weight = 0.0
        jobs.JOBS["tokenizer"].run(config, tmp_path / stage)
        tokenizer = tokenizers.build(config.tokenizer, 32)
        return artifacts.read_tokenizer(tmp_path / stage / "tokenizer", config, tokenizer)

    first = run("first", "alitok_causal")
    source = {"tokenizer_training__init_from": str(tmp_path / "first" / "tokenizer")}
    source |= {"tokenizer_training__trained": "decoder"}
    with pytest.raises(RearError, match=r"belongs to another config: .*tokenizer\.buffer_tokens"):
        run("refused", "alitok", **source)
    second = run("second", "alitok", tokenizer_training__init_parts="codes", **source)
    assert not any(moved({p: first[p] for p in ("encoder", "codebook")}, second).values())
    assert second["decoder"]["class_embedding"].shape == (2, 24)


def stored(folder, config, params):
    """The folder, with parameters of the config's tokenizer as `--job=tokenizer` would leave them."""
    store = Checkpoints(folder, keep=1)
    store.save(0, {"params": jax.device_put({"tokenizer": params})}, config.to_dict())
    store.close()
    return folder


@pytest.mark.slow
def test_a_decoder_of_pixels_on_an_encoder_that_was_trained_with_codes(tmp_path):
    sizes = {"patch_size": 8, "proxy_channel_mult": (1, 1, 1, 1)}
    config = toy.config(tokenizer=section("codes", **sizes))
    params = tiny("codes", image_size=32, **sizes)[1]
    place = stored(tmp_path / "first", config, params)
    config.tokenizer.predicts = "pixels"
    pixels = tokenizers.build(config.tokenizer, 32)
    assert set(tokenizers.shapes(pixels)) == {"encoder", "codebook", "decoder"}
    read = artifacts.read_encoder(place, config, pixels)
    assert set(read) == {"encoder", "codebook"}
    chex.assert_trees_all_equal(read, {part: params[part] for part in read})
    config.tokenizer.legacy_reshape = False
    with pytest.raises(RearError, match=r"another config: tokenizer\.legacy_reshape \(was True, now False\)\. "):
        artifacts.read_encoder(place, config, pixels)


def experiment(kind: str, longer: int = 0):
    """The toy experiment, reAR on the codes of a tokenizer without a grid, `longer` codes more than in SIZES."""
    length = {"pixels": "num_latent_tokens", "alitok": "prefix_tokens"}[kind]
    config = toy.config(tokenizer=section(kind, patch_size=8))
    config.tokenizer[length] += longer
    if kind == "alitok":
        small = config.model
        config.model = configs.alitok_generator()
        config.model.update({key: small[key] for key in ("width", "depth", "heads", "mlp_width", "dtype")})
        config.model.prefix_tokens = config.tokenizer.prefix_tokens
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "codes"), [("pixels", 5), ("alitok", 3 + 16)])
def test_a_whole_experiment(kind, codes, tmp_path):
    config = experiment(kind)
    for job in ("tokenizer", "tokenize", "train", "sample", "evaluate"):
        jobs.JOBS[job].run(config, tmp_path)
    header = json.loads((tmp_path / "codes" / "header.json").read_text())
    assert (header["codes_per_image"], header["codebook_size"]) == (codes, 12)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (24, 32, 32, 3)
    names = {"samples", "held-out real images (the floor)", "held-out images through the tokenizer"}
    assert json.loads((tmp_path / "scores.json").read_text())["scores"].keys() == names

    longer = experiment(kind, 1)
    params = tiny(kind, 32, **{key: longer.tokenizer[key] for key in longer.tokenizer if key != "name"})[1]
    longer.tokenizer_from = str(stored(tmp_path / "longer", longer, params))
    longer.init_from = str(tmp_path / "generator")
    with pytest.raises(RearError, match=r"generator belongs to another config: .* \(was \d, now \d\)"):
        jobs.JOBS["sample"].run(longer, tmp_path / "other")
    longer.codes_from, longer.init_from = str(tmp_path / "codes"), ""
    with pytest.raises(RearError, match="the codes have fingerprint"):
        jobs.JOBS["train"].run(longer, tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("codes", {"objective": "code"}, "objective = 'code': use pixels or codes"),
        ("codes", {"trained": "encoder"}, "trained = 'encoder': use all or decoder"),
        ("codes", {"trained": "decoder"}, r"leaves the encoder as it is: .*init_from"),
        ("codes", {"objective": "codes"}, r"needs a tokenizer with .*proxy"),
        ("pixels", {"objective": "codes", "proxy": "x.bin"}, r"config\.tokenizer\.predicts = 'codes'"),
        ("codes", {"objective": "codes", "proxy": "x.bin"}, r"x\.bin does not exist"),
        ("codes", {"init_from": "x.bin", "init_parts": "decoder"}, "init_parts = 'decoder': use all or codes"),
    ],
)
def test_refusals_of_training(tmp_path, kind, changes, message):
    config = toy.config(tokenizer=section(kind))
    config.tokenizer_training.update(changes)
    with pytest.raises(RearError, match=message):
        jobs.JOBS["tokenizer"].run(config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("codes", {"patch_size": 5}, "image_size 16 is not a multiple of tokenizer.patch_size 5"),
        ("alitok", {"patch_size": 5}, "image_size 16 is not a multiple of tokenizer.patch_size 5"),
        (
            "codes",
            {"encoder_heads": 7},
            r"encoder_width = \d+ is not divisible by config\.tokenizer\.encoder_heads = 7",
        ),
        (
            "alitok",
            {"decoder_heads": 7},
            r"decoder_width = \d+ is not divisible by config\.tokenizer\.decoder_heads = 7",
        ),
        ("codes", {"patch_size": 2}, "would decode images of 16 pixels to 32: give tokenizer.patch_size"),
        ("codes", {"predicts": "words"}, "predicts 'words' is unknown: use codes or pixels"),
    ],
)
def test_refusals_of_sizes(kind, changes, message):
    with pytest.raises(RearError, match=message):
        tiny(kind, **changes)
