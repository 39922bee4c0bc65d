"""A text encoder from nothing: its files are those of a published one."""

import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.text import random_encoder, t5_files
from rear_jax.text.vocabulary import T5Vocabulary

CAPTIONS = ["a bright dress", "a dark dress", "a dark coat, wide"]
SIZES = {"width": 16, "depth": 1, "heads": 2, "head_size": 4, "mlp_width": 8, "vocabulary_size": 12}


@pytest.mark.slow
def test_it_is_read_like_a_published_one(tmp_path):
    random_encoder.make(tmp_path, CAPTIONS, SIZES, seed=0)
    module, params, fingerprint = t5_files.load(str(tmp_path / "model.safetensors"), "float32")
    assert (module.width, module.depth, module.heads, module.vocabulary_size) == (16, 1, 2, 12)
    vocabulary = T5Vocabulary(tmp_path / "tokenizer.json")
    ids, mask = vocabulary.encode(["a DARK dress", "dress a dark", "a pink dress"], 6)
    assert mask.sum(axis=1).tolist() == [4, 4, 4]
    assert sorted(ids[0]) == sorted(ids[1])
    assert ids[2, 1] == 2  # unknown
    features = module.apply({"params": params}, ids, mask)
    assert (np.abs(features[0] - features[1]).max(axis=1)[:3] > 0.1).all()
    assert fingerprint


def test_the_same_captions_and_seed_give_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_encoder.make(tmp_path / name, CAPTIONS, SIZES, seed=seed)
    read = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert read[0] == read[1]
    assert read[0]["tokenizer.json"] == read[2]["tokenizer.json"]
    assert read[0]["model.safetensors"] != read[2]["model.safetensors"]


@pytest.mark.parametrize("name", ["depth", "heads", "head_size", "mlp_width", "vocabulary_size"])
def test_sizes_that_make_no_encoder(tmp_path, name):
    with pytest.raises(RearError, match=rf"config\.text\.{name} = 0: an encoder that is made here has at least"):
        random_encoder.make(tmp_path, CAPTIONS, SIZES | {name: 0}, seed=0)
