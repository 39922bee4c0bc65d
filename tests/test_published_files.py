"""Published files of the wrong shape, in other wrappings, and in several files."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rear_jax import tokenizers
from rear_jax.artifacts import published
from rear_jax.errors import RearError
from rear_jax.weights import layout, shards
from tests import toy

SIGNATURE = "target_aware_pos_embed"  # of RAR


@pytest.fixture(scope="module")
def tokenizer(trained, tmp_path_factory):
    """A published tokenizer, and its tensors."""
    file = tmp_path_factory.mktemp("published") / "tokenizer.safetensors"
    toy.run(trained, "convert", convert__source=str(trained / "tokenizer"), convert__export=str(file))
    return file, load_file(file)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (1, 0, 0), (1, 4, 0)])
def test_shapes_of_no_network_are_one_line(tmp_path, shape):
    names = (SIGNATURE, "pos_embed", "embeddings.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.fc1.weight")
    save_file({name: np.zeros(shape, np.float32) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(RearError, match=r"a\.safetensors (has|is) "):
        toy.run(tmp_path, "convert", convert__source=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model.", "model._orig_mod."])
def test_prefixes_of_all_keys_do_not_matter(tokenizer, tmp_path, prefix):
    _, tensors = tokenizer
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    found = published.open_published(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert published.detect(found, "a").KIND == "tokenizer"
    np.testing.assert_array_equal(found["decoder.conv_out.bias"], tensors["decoder.conv_out.bias"])


def test_a_file_written_anew_keeps_its_prefixes(tokenizer, trained, tmp_path):
    _, tensors = tokenizer
    zeros = {f"module.{key}": np.zeros_like(value) for key, value in tensors.items()}
    save_file(zeros, tmp_path / "a.safetensors")
    given = {"source": trained / "tokenizer", "onto": tmp_path / "a.safetensors", "export": tmp_path / "b.safetensors"}
    toy.run(trained, "convert", **{f"convert__{key}": str(value) for key, value in given.items()})
    written = load_file(tmp_path / "b.safetensors")
    assert written.keys() == zeros.keys()
    assert all(np.array_equal(written[f"module.{key}"], value) for key, value in tensors.items())


@pytest.fixture(scope="module")
def bare():
    """Tensors of a tokenizer under the authors' keys, all zero."""
    module = toy.tokenizer(toy.config())
    family = tokenizers.family_of(module)
    shapes = layout.torch_shapes(family.shapes(module), family.layout.torch_name)
    return {key: np.zeros(value.shape, np.float32) for key, value in shapes.items()}


@pytest.mark.parametrize("prefix", ["model.", "ema.module.", "generator."])
def test_a_file_of_training_holds_the_network_under_a_prefix(bare, tmp_path, caplog, prefix):
    """Beside it are other networks, of a loss or of a discriminator, which nothing here reads."""
    wrapped = {prefix + key: value for key, value in bare.items()}
    others = {"loss.lin0.weight": np.zeros(3, np.float32), "step": np.zeros(1, np.int64)}
    save_file(wrapped | others, tmp_path / "a.safetensors")
    found = published.open_published(tmp_path / "a.safetensors")
    assert found.keys() == bare.keys()
    assert published.detect(found, "a").KIND == "tokenizer"
    assert found["decoder.conv_out.bias"].shape == (3,)
    assert f"taking the {len(bare)} tensors under {prefix!r}, leaving out 2 others" in caplog.text


def test_a_part_of_a_network_and_a_distributed_one_are_refused_by_name(bare, tmp_path):
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file(bare, part)
    with pytest.raises(RearError, match=r"of-00002\.safetensors is one of the 2 files of a network: name its folder"):
        published.open_published(part)
    whole = part.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert published.open_published(whole).keys() == bare.keys()
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / "__0_0.distcp").touch()
    with pytest.raises(RearError, match=r"dcp is a distributed checkpoint of PyTorch: join it by `.* dcp_to_torch "):
        published.weights_file(tmp_path / "dcp")


def test_an_index_may_have_another_name_if_it_is_the_only_one(bare, tmp_path):
    save_file(bare, tmp_path / "part.safetensors")
    index = tmp_path / "tokenizer.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(bare, "part.safetensors")}))
    assert published.open_published(index).keys() == bare.keys()
    with pytest.raises(
        RearError, match=r"has no config\.json beside its weights: download it too, or name .*index\.json"
    ):
        published.weights_file(tmp_path)
    (tmp_path / published.HUB_CONFIG).write_text("{}")
    assert published.open_published(tmp_path).keys() == bare.keys()
    (tmp_path / "other.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(RearError, match=r"has a config\.json but neither of"):
        published.weights_file(tmp_path)


@pytest.mark.parametrize("config", ["{}", "[]", "1"])
def test_a_folder_of_shards_is_one_network(tokenizer, tmp_path, config):
    _, tensors = tokenizer
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}
    for name in set(names.values()):
        save_file({key: value for key, value in tensors.items() if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / published.HUB_CONFIG).write_text(config)
    assert published.weights_file(tmp_path) == tmp_path / "model.safetensors.index.json"
    assert published.open_published(tmp_path).keys() == tensors.keys()
    toy.run(tmp_path / "run", "convert", convert__source=str(tmp_path))


def test_an_index_that_is_none_is_named(tmp_path):
    for index in ("[]", '{"weight_map": []}', '{"weight_map": {"a": "../a"}}', "[" * 100_000, "\0", "1e999"):
        (tmp_path / "a.json").write_text(index)
        with pytest.raises(RearError, match=r"a\.json"):
            shards.open_weights(tmp_path / "a.json")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_are_taken(tokenizer, tmp_path, dtype):
    _, tensors = tokenizer
    save_file({key: value.astype(dtype) for key, value in tensors.items()}, tmp_path / "a.safetensors")
    toy.run(tmp_path, "convert", convert__source=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("dtype", [np.int32, np.bool_])
def test_other_numbers_are_not(tokenizer, tmp_path, dtype):
    _, tensors = tokenizer
    changed = tensors | {"decoder.conv_out.bias": np.zeros(3, dtype)}
    save_file(changed, tmp_path / "a.safetensors")
    with pytest.raises(RearError, match=r"1 of no floats: decoder\.conv_out\.bias"):
        toy.run(tmp_path, "convert", convert__source=str(tmp_path / "a.safetensors"))
