"""A generator is trained further for other classes than it was trained for: these are new, and all else stays."""

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from rear_jax import artifacts, generators, jobs
from rear_jax.errors import RearError
from rear_jax.runtime.checkpoints import Saved
from rear_jax.weights import layout
from tests import toy
from tests.test_alitok import toy_config as alitok_config

CONFIGS = {"rar": toy.config, "llamagen": toy.llamagen_config, "alitok": alitok_config}


def with_classes(config, count: int):
    config = config.copy_and_resolve_references()
    config.data.num_classes = count
    return config, toy.generator(config)


def fresh_params(network, seed: int):
    """As training starts from nothing."""
    return jax.device_get(jax.jit(lambda: generators.family_of(network).init(network, seed))())


def write(config, file):
    """A file under the authors' keys with a fresh generator of the config's; its parameters."""
    network = toy.generator(config)
    family = generators.family_of(network)
    params = fresh_params(network, 3)
    save_file(layout.to_torch(params, family.layout.torch_name), file)
    return params


def same_but_for(table: str, found, before) -> None:
    """All parameters but one table are bit for bit what they were."""
    rest = ({name: value for name, value in tree.items() if name != table} for tree in (found, before))
    chex.assert_trees_all_equal(*rest)


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("name", CONFIGS)
def test_classes_of_a_file_start_fresh_and_nothing_else_does(name, count, tmp_path, caplog):
    file, (old, _) = tmp_path / "a.safetensors", with_classes(CONFIGS[name](), 10)
    before = write(old, file)
    config, network = with_classes(old, count)
    family = generators.family_of(network)
    table, fresh = family.class_table, fresh_params(network, config.seed)
    artifacts.check_start(file, config, tmp_path, network, ())
    found = artifacts.read_start(file, config, network, None)
    same_but_for(table, found, before)
    codes = len(before[table]) - 11
    assert found[table].shape == (codes + count + 1, 16)
    np.testing.assert_array_equal(found[table][:codes], before[table][:codes])
    np.testing.assert_allclose(found[table][codes:-1], fresh[table][codes:-1], rtol=1e-6)
    np.testing.assert_array_equal(found[table][-1], before[table][-1])  # of no class
    assert f"has 10 classes and config.data.num_classes is {count}: these start fresh" in caplog.text


def test_the_same_classes_stay(tmp_path, caplog):
    before = write(toy.config(), tmp_path / "a.safetensors")
    found = artifacts.read_start(tmp_path / "a.safetensors", *with_classes(toy.config(), 10), None)
    chex.assert_trees_all_equal(found, before)
    assert "fresh" not in caplog.text


def test_classes_of_a_checkpoint_start_fresh(trained):
    tokenizer = artifacts.load_tokenizer(toy.config(), trained)
    before = artifacts.read_generator(trained / "generator", *with_classes(toy.config(), 10), tokenizer)
    config, network = with_classes(toy.config(), 2)
    artifacts.check_start(trained / "generator", config, trained, network, ())
    found = artifacts.read_start(trained / "generator", config, network, tokenizer)
    same_but_for("embeddings", found, before)
    np.testing.assert_array_equal(found["embeddings"][:17], before["embeddings"][:17])  # 16 codes and the mask
    np.testing.assert_array_equal(found["embeddings"][-1], before["embeddings"][-1])
    assert found["embeddings"].shape == (20, 16)


@pytest.mark.parametrize("name", ["sample", "posttrain", "convert"])
def test_other_jobs_refuse_a_file_of_other_classes(name, trained, tmp_path):
    write(toy.config(), tmp_path / "a.safetensors")
    given = {"tokenizer_from": str(trained / "tokenizer"), "init_from": str(tmp_path / "a.safetensors")}
    given |= {"convert__source": given["init_from"], "posttrain__reward__perceptual": 0.0}
    config = toy.config(data__num_classes=12, **given)
    with pytest.raises(RearError, match=r"has 10 classes, config\.data\.num_classes = 12: set it to 10\. Only --job="):
        jobs.check_all((name,), config, tmp_path / "workdir")


def test_what_differs_besides_is_what_is_told(tmp_path):
    """A file for another codebook is not taken for one of other classes."""
    file = tmp_path / "a.safetensors"
    write(toy.config(tokenizer__codebook_size=32), file)
    for check in (artifacts.check_start, artifacts.check_generator):
        with pytest.raises(RearError, match=r"lm_head\.weight \(32, 16\)|lm_head\.bias \(32,\)"):
            check(file, toy.config(), tmp_path, toy.generator(toy.config()), ())


@pytest.mark.slow
def test_a_generator_is_trained_further_for_more_classes_resumed_and_sampled(trained, tmp_path, caplog):
    given = {"tokenizer_from": str(trained / "tokenizer"), "init_from": str(trained / "generator")}
    given |= {"data__num_classes": 12, "sample__stage": "train"}
    jobs.run_all(("tokenize", "train"), toy.config(**given, train__loop__steps=4), tmp_path)
    jobs.run_all(("train", "sample"), toy.config(**given, train__loop__steps=8, sample__classes=(9, 11)), tmp_path)
    assert caplog.text.count("start fresh") == 1  # the second command goes on from its own checkpoint
    assert Saved(tmp_path / "generator").latest_step() == 8
    shapes = traverse_util.flatten_dict(generators.shapes(with_classes(toy.config(), 12)[1]))
    assert shapes["embeddings",].shape == (30, 16)
    with np.load(tmp_path / "samples.npz") as samples:
        assert sorted(set(samples["labels"].tolist())) == [9, 11]
