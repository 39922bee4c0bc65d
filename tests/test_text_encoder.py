"""From captions to a generator's features: the parts of the text encoder together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.text import encoder as text_encoder
from rear_jax.text import t5_files
from rear_jax.text.encoder import TextEncoder, right_aligned
from rear_jax.text.t5 import T5Encoder
from rear_jax.weights import layout
from tests.test_vocabulary import SENTENCES, spiece, tokenizer_json

SIZES = {"vocabulary_size": 72, "width": 24, "depth": 2, "heads": 3, "head_size": 4, "mlp_width": 16, "buckets": 32}
CAPTIONS = [SENTENCES[0], "<b>A</b> Blue  Bird", "", "  https://x.com/y "]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Weights of a small encoder, and the vocabulary of its tokens."""
    folder = tmp_path_factory.mktemp("text")
    draw = np.random.default_rng(0).normal
    shapes = layout.torch_shapes(t5_files.shapes(T5Encoder(**SIZES, dtype=jnp.dtype("float32"))), t5_files.torch_name)
    save_file(
        {k: draw(scale=0.3, size=v.shape).astype(np.float32) for k, v in shapes.items()}, folder / "t5.safetensors"
    )
    (folder / "spiece.model").write_bytes(spiece())
    return {"weights": str(folder / "t5.safetensors"), "vocabulary": str(folder / "spiece.model")}


@pytest.fixture(scope="module")
def encoder(files) -> TextEncoder:
    return TextEncoder(**files, length=30, dtype="float32")


def test_rows_move_to_the_right_in_order():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    hidden = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4, 1)
    moved, visible = right_aligned(hidden, mask)
    assert moved[..., 0].tolist() == [[0, 0, 1, 2], [0, 0, 6, 8], [0, 0, 0, 0], [13, 14, 15, 16]]
    assert visible.tolist() == [[False, False, True, True]] * 2 + [[False] * 4, [True] * 4]


def test_features_of_captions(encoder):
    features, mask = encoder.encode(CAPTIONS)
    assert features.shape == (4, 30, SIZES["width"])
    assert features.dtype == jnp.float32
    assert mask.dtype == bool
    ids, visible = encoder.tokens(CAPTIONS)
    counts = visible.sum(axis=1)
    assert counts.tolist()[2:] == [1, 1]  # the end token alone: nothing is left of an address
    for row, shown, count in zip(features, mask, counts, strict=True):
        assert shown.tolist() == [False] * (30 - count) + [True] * count
        np.testing.assert_array_equal(row[: 30 - count], 0.0)
    count = counts[1]
    alone = jax.jit(encoder.module.apply)({"params": encoder.params}, ids[1:2, :count], visible[1:2, :count])
    np.testing.assert_allclose(features[1, 30 - count :], alone[0], atol=1e-5)


def test_captions_are_cleaned(encoder):
    assert encoder.tokens(["<b>A</b> Blue  Bird"])[0].tolist() == encoder.tokens(["a blue bird"])[0].tolist()
    assert encoder.tokens(["A &lt;b&gt; Bird"])[0].tolist() == encoder.tokens(["a bird"])[0].tolist()  # twice


def test_a_step_gets_the_same_features(encoder):
    @jax.jit
    def step(params, ids, mask):
        return encoder.features(params, ids, mask)

    found, wanted = step(encoder.params, *encoder.tokens(CAPTIONS)), encoder.encode(CAPTIONS)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), found, wanted)


def test_each_number_of_captions_is_compiled_once(files, monkeypatch):
    traced = []

    def aligned(hidden, mask):
        traced.append(hidden.shape)
        return right_aligned(hidden, mask)

    monkeypatch.setattr(text_encoder, "right_aligned", aligned)
    encoder = TextEncoder(**files, length=4)
    for count in (2, 1, 2, 1):
        encoder.encode(SENTENCES[:count])
    assert traced == [(2, 4, 24), (1, 4, 24)]
    with pytest.raises(RearError, match="no captions to encode"):
        encoder.encode([])


def test_fingerprint_names_all_that_decides(files, encoder, tmp_path, monkeypatch):
    found = {encoder.fingerprint}
    assert TextEncoder(**files, length=30, dtype="float32").fingerprint in found
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    for changes in ({"length": 29}, {"dtype": "bfloat16"}, {"vocabulary": str(tmp_path / "tokenizer.json")}):
        found.add(TextEncoder(**files | {"length": 30, "dtype": "float32"} | changes).fingerprint)
    monkeypatch.setattr(text_encoder.cleaning, "VERSION", 0)
    found.add(TextEncoder(**files, length=30, dtype="float32").fingerprint)
    assert len(found) == 5


def test_what_is_wrong_is_refused(files, tmp_path):
    with pytest.raises(RearError, match="no room for the end token"):
        TextEncoder(**files, length=0)
    with pytest.raises(RearError, match="does not compute in float16"):
        TextEncoder(**files, dtype="float16")
    with pytest.raises(RearError, match=r"There is no vocabulary .*absent"):
        TextEncoder(files["weights"], str(tmp_path / "absent"))
    with pytest.raises(RearError, match=r"no checkpoint file .*absent"):
        TextEncoder(str(tmp_path / "absent"), files["vocabulary"])
    small = T5Encoder(**SIZES | {"vocabulary_size": 63}, dtype=jnp.dtype("float32"))
    shapes = layout.torch_shapes(t5_files.shapes(small), t5_files.torch_name)
    save_file({key: np.zeros(value.shape, np.float32) for key, value in shapes.items()}, tmp_path / "t5.safetensors")
    with pytest.raises(RearError, match=r"spiece\.model has 64 tokens, and .*t5\.safetensors knows 63: give"):
        TextEncoder(str(tmp_path / "t5.safetensors"), files["vocabulary"])
