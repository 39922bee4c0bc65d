"""TiTok and AliTok as others store them: files and hub folders, in and out."""

import json

import chex
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax import artifacts, jobs, tokenizers
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.tokenizers import titok
from rear_jax.weights.layout import from_torch, to_torch
from rear_jax.weights.torch_files import read_tensors
from tests import toy
from tests.toy_sequence import section, tiny


@pytest.mark.parametrize("kind", ["codes", "pixels", "alitok"])
def test_a_file_goes_out_and_comes_back(kind, tmp_path):
    tokenizer, params = tiny(kind)
    layout, file = tokenizers.family_of(tokenizer).layout, tmp_path / "file.safetensors"
    save_file(to_torch(params, layout.torch_name), file)
    read = read_tensors(file)
    assert published.detect(read, "file") is tokenizers.family_of(tokenizer)
    found = layout.sizes(read)
    wanted = {key: value for key, value in section(kind).items() if key in found}
    assert found == wanted
    again = from_torch(read, tokenizers.shapes(tokenizer), layout.torch_name, ignore=layout.ignore)
    chex.assert_trees_all_equal(again, params)
    config = toy.config(tokenizer=section(kind), data__image_size=16)
    for key in ("quantize.embedding.weight", "latent_tokens"):
        save_file({k: v for k, v in read.items() if k != key}, file)
        with pytest.raises(
            RearError, match=rf"file\.safetensors has no tensor '{key}': .*not a whole {config.tokenizer.name}"
        ):
            artifacts.read_tokenizer(file, config, tokenizer)


@pytest.mark.parametrize(("kind", "legacy"), [("codes", True), ("pixels", False)])
def test_a_file_is_held_against_the_reshape_that_goes_with_its_decoder(kind, legacy, tmp_path):
    """The authors' code has one flag for both, so the decoder in a file tells how its encoder is read."""
    tokenizer, params = tiny(kind)
    config = toy.config(tokenizer=section(kind, legacy_reshape=not legacy), data__image_size=16)
    save_file(to_torch(params, titok.torch_name), tmp_path / "file.safetensors")
    with pytest.raises(RearError, match=rf"legacy_reshape {legacy} \(config: {not legacy}\)"):
        artifacts.read_tokenizer(tmp_path / "file.safetensors", config, tokenizer)


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
    folder = hub_folder(tmp_path / "hub", params)
    chex.assert_trees_all_equal(artifacts.read_tokenizer(folder, config, tokenizer), params)
    config.convert.source = str(folder)
    jobs.JOBS["convert"].run(config, tmp_path)
    assert (tmp_path / "converted").is_dir()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert published.weights_file(folder) == folder / "pytorch_model.bin"
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(RearError, match=r"has a config\.json but neither of model\.safetensors"):
        artifacts.read_tokenizer(folder, config, tokenizer)


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
        artifacts.read_tokenizer(folder, config, tokenizer)


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
    jobs.JOBS["convert"].run(config, tmp_path)
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
    back = artifacts.read_tokenizer(tmp_path / "hub", config, tokenizer)
    chex.assert_trees_all_equal(back, params)
    with pytest.raises(RearError, match=r"hub' exists already: name a new folder"):
        jobs.JOBS["convert"].run(config, tmp_path / "again")


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
    tokenizer, params = tiny(kind)
    save_file(to_torch(params, tokenizers.family_of(tokenizer).layout.torch_name), config.convert.source)
    with pytest.raises(RearError, match=message):
        jobs.JOBS["convert"].run(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]
