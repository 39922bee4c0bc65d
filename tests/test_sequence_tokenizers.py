"""TiTok and AliTok: sizes, interface, order of the codes, both stages of training, and the published forms."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import artifacts, jobs, tokenizers
from rear_jax import config as configs
from rear_jax.convert import alitok_tokenizer, published, titok
from rear_jax.convert.layout import from_torch, to_torch
from rear_jax.convert.torch_files import read_tensors
from rear_jax.errors import RearError
from rear_jax.tokenizers.discriminator import PatchDiscriminator
from rear_jax.training import vq
from rear_jax.training.checkpoints import Checkpoints
from rear_jax.training.state import decay_mask
from tests import toy

IMAGES = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
SIZES = {"encoder_width": 16, "encoder_depth": 2, "encoder_heads": 2} | {
    "decoder_width": 24,
    "decoder_depth": 2,
    "decoder_heads": 2,
    "codebook_size": 12,
    "codebook_dim": 4,
    "dtype": "float32",
}
PROXY = {  # that of tests/toy_config.py with a level less
    "proxy_codebook_size": 16,
    "proxy_dim": 4,
    "proxy_channels": 8,
    "proxy_channel_mult": (1, 1, 1),
    "proxy_res_blocks": 1,
}
TITOK = SIZES | PROXY | {"patch_size": 4, "num_latent_tokens": 5}
ALITOK = SIZES | {"patch_size": 4, "prefix_tokens": 3, "buffer_tokens": 2}
KINDS = {
    "codes": (configs.titok, TITOK),
    "pixels": (configs.titok, TITOK | {"predicts": "pixels", "legacy_reshape": False}),
    "alitok": (configs.alitok, ALITOK),
    "alitok_causal": (configs.alitok, ALITOK | {"causal_decoder": True, "buffer_tokens": 0}),
}
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


def section(kind: str, **changes):
    made, sizes = KINDS[kind]
    made = made()
    made.update(sizes | changes)
    return made


def tiny(kind: str, image_size: int = 16, **changes):
    """A tokenizer with weights drawn without running `init`."""
    tokenizer = tokenizers.build(section(kind, **changes), image_size)
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(0.0, 0.4, leaf.shape).astype(leaf.dtype)  # noqa: E731
    return tokenizer, jax.tree.map(draw, artifacts.tokenizer_shapes(tokenizer))


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
    shapes = artifacts.tokenizer_shapes(tokenizer)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert count == pytest.approx(millions, abs=0.05)
    assert published.lookup("tokenizer", config.tokenizer)[1] == pytest.approx(count, abs=0.05)
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
    _, params = tiny("codes")
    decayed = {path[-1].key for path, leaf in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if leaf}
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
    optimizer = vq.make_optimizer(config)
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
        lambda leaf: rng.normal(0.0, 0.2, leaf.shape).astype(leaf.dtype), artifacts.tokenizer_shapes(proxy)
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
    jax.tree.map(np.testing.assert_array_equal, after["tokenizer"]["pixel_decoder"], proxy_params["decoder"])


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
        jobs.JOBS["tokenizer"](config, tmp_path / stage)
        return Checkpoints(tmp_path / stage / "tokenizer", keep=1), config

    proxy = str(trained / "tokenizer")
    run("first", tokenizer_training__objective="codes", tokenizer_training__proxy=proxy)
    _, config = run(
        "second",
        tokenizer_training__trained="decoder",
        tokenizer_training__init_from=str(tmp_path / "first" / "tokenizer"),
    )
    shapes = artifacts.tokenizer_shapes(tokenizers.build(config.tokenizer, 32))
    maskgit = artifacts.load_tokenizer(toy.config(tokenizer_from=proxy), tmp_path).params
    first, second = (artifacts.read_tokenizer(tmp_path / s / "tokenizer", config, shapes) for s in ("first", "second"))
    jax.tree.map(np.testing.assert_array_equal, first["pixel_decoder"], maskgit["decoder"])
    np.testing.assert_array_equal(first["pixel_codebook"], maskgit["codebook"])
    assert {part for part, has_moved in moved(first, second).items() if not has_moved} == {"encoder", "codebook"}
    assert (tmp_path / "second" / "reconstructions.png").exists()


@pytest.mark.slow
def test_a_new_decoder_on_an_encoder_that_is_trained_already(tmp_path):
    def run(stage, kind, **changes):
        config = toy.config(tokenizer=section(kind, patch_size=8), **changes)
        config.tokenizer_training.loop.update(steps=1, checkpoint_every=1, log_every=1)
        config.tokenizer_training.perceptual_weight = 0.0
        jobs.JOBS["tokenizer"](config, tmp_path / stage)
        shapes = artifacts.tokenizer_shapes(tokenizers.build(config.tokenizer, 32))
        return artifacts.read_tokenizer(tmp_path / stage / "tokenizer", config, shapes)

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


def test_a_decoder_of_pixels_on_an_encoder_that_was_trained_with_codes(tmp_path):
    sizes = {"patch_size": 8, "proxy_channel_mult": (1, 1, 1, 1)}
    config = toy.config(tokenizer=section("codes", **sizes))
    params = tiny("codes", image_size=32, **sizes)[1]
    place = stored(tmp_path / "first", config, params)
    config.tokenizer.predicts = "pixels"
    pixels = tokenizers.build(config.tokenizer, 32)
    assert set(artifacts.tokenizer_shapes(pixels)) == {"encoder", "codebook", "decoder"}
    read = artifacts.read_encoder(place, config, artifacts.tokenizer_shapes(pixels))
    assert set(read) == {"encoder", "codebook"}
    jax.tree.map(np.testing.assert_array_equal, read, {part: params[part] for part in read})
    config.tokenizer.legacy_reshape = False
    with pytest.raises(RearError, match=r"another config: tokenizer\.legacy_reshape \(was True, now False\)\. "):
        artifacts.read_encoder(place, config, artifacts.tokenizer_shapes(pixels))


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
        jobs.JOBS[job](config, tmp_path)
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
        jobs.JOBS["sample"](longer, tmp_path / "other")
    longer.codes_from, longer.init_from = str(tmp_path / "codes"), ""
    with pytest.raises(RearError, match="the codes have fingerprint"):
        jobs.JOBS["train"](longer, tmp_path / "other")


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
        jobs.JOBS["tokenizer"](config, tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("codes", {"patch_size": 5}, "image_size 16 is not a multiple of tokenizer.patch_size 5"),
        ("alitok", {"patch_size": 5}, "image_size 16 is not a multiple of tokenizer.patch_size 5"),
        ("codes", {"patch_size": 2}, "would decode images of 16 pixels to 32: give tokenizer.patch_size"),
        ("codes", {"predicts": "words"}, "predicts 'words' is unknown: use codes or pixels"),
    ],
)
def test_refusals_of_sizes(kind, changes, message):
    with pytest.raises(RearError, match=message):
        tiny(kind, **changes)


@pytest.mark.parametrize("kind", ["codes", "pixels", "alitok"])
def test_a_file_goes_out_and_comes_back(kind, tmp_path):
    tokenizer, params = tiny(kind)
    convert = alitok_tokenizer if kind == "alitok" else titok
    save_file(to_torch(params, convert.torch_name), tmp_path / "file.safetensors")
    read = read_tensors(tmp_path / "file.safetensors")
    assert published.detect(read, "file").layout is convert
    found = convert.sizes(read)
    wanted = {key: value for key, value in section(kind).items() if key in found}
    assert found == wanted
    again = from_torch(read, artifacts.tokenizer_shapes(tokenizer), convert.torch_name, ignore=convert.IGNORE)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for key in ("quantize.embedding.weight", "latent_tokens"):
        with pytest.raises(RearError, match=f"x has no tensor '{key}'"):
            convert.sizes({k: v for k, v in read.items() if k != key}, source="x")


@pytest.mark.parametrize(("kind", "legacy"), [("codes", True), ("pixels", False)])
def test_a_file_is_held_against_the_reshape_that_goes_with_its_decoder(kind, legacy, tmp_path):
    """The authors' code has one flag for both, so the decoder in a file tells how its encoder is read."""
    tokenizer, params = tiny(kind)
    config = toy.config(tokenizer=section(kind, legacy_reshape=not legacy), data__image_size=16)
    save_file(to_torch(params, titok.torch_name), tmp_path / "file.safetensors")
    with pytest.raises(RearError, match=rf"legacy_reshape {legacy} \(config: {not legacy}\)"):
        artifacts.read_tokenizer(tmp_path / "file.safetensors", config, artifacts.tokenizer_shapes(tokenizer))


@pytest.mark.parametrize(("width", "heads"), [(512, 8), (768, 12), (1024, 16), (640, None)])
def test_heads_follow_from_a_published_width(width, heads):
    empty = np.zeros(1, np.float32)
    tensors = {
        "latent_tokens": np.broadcast_to(empty, (5, width)),
        "encoder.patch_embed.weight": np.broadcast_to(empty, (width, 3, 16, 16)),
        "decoder.decoder_embed.weight": np.broadcast_to(empty, (width, 12)),
        "quantize.embedding.weight": np.broadcast_to(empty, (4096, 12)),
    }
    found = titok.sizes(tensors)
    assert (found.get("encoder_heads"), found.get("decoder_heads")) == (heads, heads)


def hub_folder(folder, params, **settings):
    """A TiTok as model hubs hand it out."""
    folder.mkdir()
    save_file(to_torch(params, titok.torch_name), folder / "model.safetensors")
    known = {"vit_enc_model_size": "small", "vit_dec_model_size": "small", "use_l2_norm": True} | settings
    (folder / "config.json").write_text(json.dumps({"model": {"vq_model": known}}))
    return folder


def test_a_hub_folder_is_read_like_a_file(tmp_path):
    tokenizer, params = tiny("codes", encoder_heads=8, decoder_heads=8)
    config = toy.config(tokenizer=section("codes", encoder_heads=8, decoder_heads=8), data__image_size=16)
    shapes = artifacts.tokenizer_shapes(tokenizer)
    folder = hub_folder(tmp_path / "hub", params)
    jax.tree.map(np.testing.assert_array_equal, artifacts.read_tokenizer(folder, config, shapes), params)
    config.convert.source = str(folder)
    jobs.JOBS["convert"](config, tmp_path)
    assert (tmp_path / "converted").is_dir()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert published.weights_file(folder) == folder / "pytorch_model.bin"
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(RearError, match=r"has a config\.json but neither of model\.safetensors"):
        artifacts.read_tokenizer(folder, config, shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"is_legacy": False}, r"legacy_reshape False \(config: True\)"),
        ({"use_l2_norm": False}, r"l2_normalize False \(config: True\)"),
        ({"vit_dec_model_size": "large"}, r"decoder_heads 16 \(config: 8\)"),
        ({"vit_dec_model_size": "huge"}, "lacks 'huge'"),
        ({"quantize_mode": "vae"}, "without a codebook"),
    ],
)
def test_what_a_hub_config_says_beyond_the_weights_is_held_against_the_config(settings, message, tmp_path):
    tokenizer, params = tiny("codes", encoder_heads=8, decoder_heads=8)
    config = toy.config(tokenizer=section("codes", encoder_heads=8, decoder_heads=8), data__image_size=16)
    folder = hub_folder(tmp_path / "hub", params, **settings)
    with pytest.raises(RearError, match=message):
        artifacts.read_tokenizer(folder, config, artifacts.tokenizer_shapes(tokenizer))


def small_sizes(monkeypatch):
    """Names for the two transformers of `tiny`, which hubs know at other sizes."""
    monkeypatch.setitem(titok.MODEL_SIZES, "small", titok.Size(16, 2, 2))
    monkeypatch.setitem(titok.MODEL_SIZES, "base", titok.Size(24, 2, 2))


@pytest.mark.parametrize("kind", ["codes", "pixels"])
def test_a_hub_folder_goes_out_and_comes_back(kind, tmp_path, monkeypatch):
    small_sizes(monkeypatch)
    tokenizer, params = tiny(kind)
    config = toy.config(tokenizer=section(kind), data__image_size=16)
    config.convert.source, config.convert.export = str(tmp_path / "file.safetensors"), str(tmp_path / "hub")
    save_file(to_torch(params, titok.torch_name), config.convert.source)
    jobs.JOBS["convert"](config, tmp_path)
    assert json.loads((tmp_path / "hub" / "config.json").read_text()) == {
        "model": {
            "vq_model": {
                "codebook_size": 12,
                "token_size": 4,
                "use_l2_norm": True,
                "commitment_cost": 0.25,
                "vit_enc_model_size": "small",
                "vit_dec_model_size": "base",
                "vit_enc_patch_size": 4,
                "vit_dec_patch_size": 4,
                "num_latent_tokens": 5,
                "finetune_decoder": kind == "codes",
                "is_legacy": kind == "codes",
            }
        },
        "dataset": {"preprocessing": {"crop_size": 16}},
    }
    back = artifacts.read_tokenizer(tmp_path / "hub", config, artifacts.tokenizer_shapes(tokenizer))
    jax.tree.map(np.testing.assert_array_equal, back, params)
    with pytest.raises(RearError, match=r"hub' exists already: name a new folder"):
        jobs.JOBS["convert"](config, tmp_path / "again")


@pytest.mark.parametrize(
    ("kind", "changes", "export", "message"),
    [
        ("pixels", {}, "hub", r"encoder_width, _depth and _heads = \(16, 2, 2\) are none of TiTok's small"),
        ("pixels", {"legacy_reshape": True}, "x.bin", r"legacy_reshape = True with predicts = 'pixels' has no"),
        ("codes", {"legacy_reshape": False}, "hub", r"legacy_reshape = False with predicts = 'codes' has no"),
        ("alitok", {}, "hub", r"must end in \.safetensors or \.bin .*which only a TiTok has"),
    ],
)
def test_what_cannot_be_exported(kind, changes, export, message, tmp_path):
    config = toy.config(tokenizer=section(kind, **changes), data__image_size=16)
    config.convert.source, config.convert.export = str(tmp_path / "file.safetensors"), str(tmp_path / export)
    convert = alitok_tokenizer if kind == "alitok" else titok
    save_file(to_torch(tiny(kind)[1], convert.torch_name), config.convert.source)
    with pytest.raises(RearError, match=message):
        jobs.JOBS["convert"](config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
