"""T5's vocabulary: both of its files split alike, and every other file is refused in one line."""

import functools
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from rear_jax.errors import RearError
from rear_jax.text.vocabulary import T5Vocabulary

SENTENCES = [
    "a photo of two red apples and a green pear on a wooden table",
    "the house is wonderful, and the harbour at dusk is quiet",
    "an oil painting of a fox in the snow under a full moon",
    "three dogs run after a blue ball in the park near the river",
    "a small blue bird sits on the branch of an old apple tree",
    "two people ride bicycles past a red house with green doors",
]
PRINTED = st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"], exclude_characters="<")
TRICKY = [
    "",
    "A Fox",
    "two  red   apples ",
    "tab\tand\nline",
    "unknown 北京 here 🍰",
    "\ufb01ne \uff26\uff35\uff2c\uff2c width",  # a ligature, full width
]


@functools.cache
def spiece() -> bytes:
    """A unigram model of the sentences with T5's special ids, as `spiece.model`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=64,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def tokenizer_json() -> str:
    """The same model as `tokenizer.json`, with the settings that the published one has."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece())
    model = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unk_id=2)
    )
    model.normalizer = tokenizers.normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    split = tokenizers.pre_tokenizers
    model.pre_tokenizer = split.Sequence([split.WhitespaceSplit(), split.Metaspace()])
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    model.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    model.enable_truncation(5)
    model.enable_padding(length=7)
    return model.to_str()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Both, each under the name of the other: the content tells which it is."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "tokenizer.json").write_bytes(spiece())
    (folder / "spiece.model").write_text(tokenizer_json())
    return {"sentencepiece": str(folder / "tokenizer.json"), "tokenizers": str(folder / "spiece.model")}


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizers"])
def vocabulary(request, files) -> T5Vocabulary:
    return T5Vocabulary(files[request.param])


def test_known_ids(vocabulary):
    """A unigram model by hand: the words of the sentences come back from their pieces."""
    piece_of = sentencepiece.SentencePieceProcessor(model_proto=spiece()).id_to_piece
    ids, mask = vocabulary.encode(["two red apples"], 40)
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    tokens = ids[0, : mask.sum()].tolist()
    assert tokens[-1] == 1
    assert "".join(piece_of(token) for token in tokens[:-1]).replace("▁", " ") == " two red apples"
    assert (ids[~mask] == 0).all()
    assert vocabulary.size in (64, 65)  # tokenizer.json counts the added token


def test_truncation_keeps_the_end_token(vocabulary):
    whole, mask = vocabulary.encode(SENTENCES, 120)
    assert mask.sum(axis=1).min() > 9
    cut, visible = vocabulary.encode(SENTENCES, 9)
    assert visible.all()
    np.testing.assert_array_equal(cut[:, :-1], whole[:, :8])
    assert (cut[:, -1] == 1).all()
    exact, visible = vocabulary.encode(SENTENCES[:1], int(mask[0].sum()))  # nothing is cut and nothing is padded
    assert visible.all()
    np.testing.assert_array_equal(exact[0], whole[0, mask[0]])
    assert vocabulary.encode(SENTENCES, 1)[0].tolist() == [[1]] * len(SENTENCES)
    with pytest.raises(RearError, match="0 tokens has no room for the end token"):
        vocabulary.encode(SENTENCES, 0)


def test_empty_texts(vocabulary):
    for text in ("", "   ", "\n"):
        ids, mask = vocabulary.encode([text], 4)
        assert ids.tolist() == [[1, 0, 0, 0]]
        assert mask.tolist() == [[True, False, False, False]]
    ids, mask = vocabulary.encode([], 4)
    assert ids.shape == mask.shape == (0, 4)


def test_unknown_characters(vocabulary):
    assert 2 in vocabulary.encode(["北京"], 8)[0]
    assert vocabulary.encode(["\ud800"], 8)[0].tolist() == vocabulary.encode(["\ufffd"], 8)[0].tolist()


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.one_of(st.sampled_from(TRICKY), st.text(PRINTED, max_size=30), st.text("abdefopr .", max_size=40)))
def test_both_files_agree(files, text):
    """On all that is printed; the packages differ about control characters and the names of special tokens."""
    results = [T5Vocabulary(path).encode([text], 50) for path in files.values()]
    for found, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_fingerprint_is_that_of_the_content(files, tmp_path):
    names = {T5Vocabulary(path).fingerprint for path in files.values()}
    assert len(names) == 2
    (tmp_path / "copy").write_bytes(spiece())
    assert T5Vocabulary(tmp_path / "copy").fingerprint in names


def without_unknown() -> bytes:
    model = json.loads(tokenizer_json())
    model["model"]["unk_id"] = None
    return json.dumps(model).encode()


def other_special_ids() -> bytes:
    model = json.loads(tokenizer_json())
    model["model"]["vocab"][1][0], model["added_tokens"] = "<eos>", []
    return json.dumps(model).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}",
        b'{"model": 3}',
        b"{" + b'"a":{' * 100_000,
        b'{"\xff": 1}',
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02}q\x00.",
        lambda: spiece()[:-7],
        lambda: spiece()[:1000],
        lambda: tokenizer_json().encode()[:-7],
        without_unknown,
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "vocabulary"
    path.write_bytes(content() if callable(content) else content)
    with pytest.raises(RearError, match=r"vocabulary is no whole vocabulary \(.*fetch T5's tokenizer") as caught:
        T5Vocabulary(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_other_vocabularies_are_refused(tmp_path):
    path = tmp_path / "vocabulary"
    path.write_bytes(other_special_ids())
    with pytest.raises(RearError, match=r"vocabulary of another network \(special tokens .*'</s>': None"):
        T5Vocabulary(path)
    path.write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(RearError, match="vocabulary of another network"):
        T5Vocabulary(path)
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RearError, match=r"There is no vocabulary .*: give T5's tokenizer\.json or"):
            T5Vocabulary(place)
