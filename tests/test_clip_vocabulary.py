"""CLIP's vocabulary: what its ids must be, its published files in every form, and what can be wrong with them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rear_jax.errors import RearError
from rear_jax.text import clip_vocabulary
from rear_jax.text.clip_vocabulary import END, MERGES, START, CLIPVocabulary, clean, ids_of, load

GOLDEN = np.load(Path(__file__).parent / "goldens" / "clip_bpe.npz")
PAIRS = GOLDEN["in/merges"].tolist()  # as lines "a b"
MERGED = [tuple(pair.split(" ")) for pair in PAIRS]
IDS = ids_of(MERGED)
VOCABULARY = CLIPVocabulary(IDS, MERGED, source="golden", context_length=16)


def write_pair(folder: Path, ids: dict | None = None, pairs: list[str] = PAIRS) -> Path:
    (folder / "vocab.json").write_text(json.dumps(IDS if ids is None else ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]))
    return folder


def write_json(folder: Path, merges: list | None = None, **model) -> Path:
    content = {"model": {"type": "BPE", "vocab": IDS, "merges": PAIRS if merges is None else merges} | model}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def write_gz(folder: Path, lines: list[str] = PAIRS) -> Path:
    file = folder / "bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *lines, ""]).encode()))
    return file


def same_ids(vocabulary: CLIPVocabulary) -> bool:
    return np.array_equal(vocabulary.encode(GOLDEN["in/texts"].tolist()), GOLDEN["out/ids"])


class TestFiles:
    def test_of_every_form_give_the_same_ids(self, tmp_path):
        for number, write in enumerate((write_pair, write_json, write_gz)):
            (folder := tmp_path / str(number)).mkdir()
            assert same_ids(load(str(write(folder)), context_length=16))
        assert same_ids(load(str(tmp_path / "1"), context_length=16))  # the folder of a tokenizer.json
        for name in ("vocab.json", "merges.txt"):
            assert same_ids(load(str(tmp_path / "0" / name), context_length=16))
        write_json(tmp_path / "1", merges=MERGED)  # as newer files have them
        assert same_ids(load(str(tmp_path / "1"), context_length=16))

    def test_of_openai_end_where_clip_does(self, tmp_path):
        """The published list goes on, with merges that CLIP has no ids for."""
        lines = [f"{a} {b}" for a in clip_vocabulary.byte_signs() for b in clip_vocabulary.byte_signs()]
        file = write_gz(tmp_path, [line for line in lines if line[0] != line[2]])
        assert load(str(file)).size == MERGES + 2 * 256 + 2 == 49408

    def test_start_and_end(self, tmp_path):
        assert (VOCABULARY.start, VOCABULARY.end, VOCABULARY.size) == (628, 629, 630)
        assert load(str(write_gz(tmp_path))).encode(["a"]).shape == (1, 77)


class TestTexts:
    def test_are_repaired(self):
        assert clean("  A &amp;amp; B\n\tâ€œQuotedâ€\x9d ") == 'a & b "quoted"'

    def test_that_are_too_long_keep_their_end(self):
        short, long = VOCABULARY.encode(["a " * 14, "a " * 15])
        np.testing.assert_array_equal(short, long)
        assert long[-1] == VOCABULARY.end
        assert long[-2] == IDS["a</w>"]

    def test_cannot_name_start_or_end(self):
        (ids,) = VOCABULARY.encode([f"{START} a {END} b"])
        assert list(ids).count(VOCABULARY.start) == 1
        assert VOCABULARY.end not in ids[:-1]

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.text(), max_size=4))
    def test_of_any_signs_have_ids(self, texts):
        ids = VOCABULARY.encode(texts)
        assert ids.shape == (len(texts), 16)
        assert ids.dtype == np.int32
        ends = np.argmax(ids, axis=1)
        for row, end in zip(ids, ends, strict=True):
            assert row[0] == VOCABULARY.start
            assert row[end] == VOCABULARY.end
            assert not row[end + 1 :].any()

    @given(st.text(alphabet="abcdefghij 'é北🙂0123!?", max_size=12))
    @settings(max_examples=50, deadline=None)
    def test_come_back(self, text):
        """Ids spell the bytes of the text, word for word."""
        wide = CLIPVocabulary(IDS, MERGED, source="golden")
        pieces = {number: piece for piece, number in IDS.items()}
        bytes_of = dict(zip(clip_vocabulary.byte_signs(), visible_first(), strict=True))
        (ids,) = wide.encode([text])
        joined = "".join(pieces[i].removesuffix("</w>") for i in ids[1 : np.argmax(ids)].tolist())
        assert bytes(bytes_of[sign] for sign in joined).decode() == clean(text).replace(" ", "")


def visible_first() -> list[int]:
    """The bytes in the order of their ids."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    return visible + [byte for byte in range(256) if byte not in visible]


class TestWrongFiles:
    def test_that_are_not_there(self, tmp_path):
        for path in (tmp_path, tmp_path / "none.json", tmp_path / "none.txt.gz"):
            with pytest.raises(RearError, match=r"there is no CLIP vocabulary at .*: give tokenizer\.json"):
                load(str(path))
        write_pair(tmp_path)
        (tmp_path / "merges.txt").unlink()
        with pytest.raises(RearError, match=r"merges\.txt cannot be read as text .*fetch it again"):
            load(str(tmp_path))
        (tmp_path / "merges.txt").write_text("\n".join(PAIRS))
        with pytest.raises(RearError, match=r"merges\.txt does not begin with a line #version"):
            load(str(tmp_path))

    def test_that_are_no_vocabulary(self, tmp_path):
        file = tmp_path / "tokenizer.json"
        for content, told in {
            "{": "is no JSON",
            "[" * 100_000: "is no JSON",
            "[]": "is no JSON object",
            '{"model": {"type": "Unigram", "vocab": []}}': "has no model with vocab and merges",
            '{"model": 3}': "has no model with vocab and merges",
        }.items():
            file.write_text(content)
            with pytest.raises(RearError, match=rf"tokenizer\.json {told}"):
                load(str(file))
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RearError, match=r"tokenizer\.json cannot be read as text"):
            load(str(file))

    @pytest.mark.parametrize(
        "merges", [3, {"a": "b"}, [3], ["a"], ["a b c"], [["a", 3]], ["a  b"], [["a", ""]], [None]]
    )
    def test_with_merges_that_are_no_pairs(self, merges, tmp_path):
        with pytest.raises(RearError, match=r"tokenizer\.json: .*no(t a)? (pair|list)"):
            load(str(write_json(tmp_path, merges=merges)))

    @pytest.mark.parametrize(
        "ids",
        [[], {}, {"a": "b"}, {"a": 0.0}, {"a": True}, {"a": 1}, {"a": 0, "b": 0}, IDS | {"!": 3}, IDS | {"new": 700}],
    )
    def test_with_ids_that_are_no_numbering(self, ids, tmp_path):
        with pytest.raises(RearError, match=r"its ids are not 0, 1, 2, …"):
            load(str(write_json(tmp_path, vocab=ids)))

    def test_of_another_model(self, tmp_path):
        moved = {piece: (number + 2) % len(IDS) for piece, number in IDS.items()}
        with pytest.raises(RearError, match=r"are not its last ids"):
            load(str(write_pair(tmp_path, moved)))
        with pytest.raises(RearError, match=r"has no id for 'zq'"):
            load(str(write_pair(tmp_path, pairs=[*PAIRS, "z q"])))
        renamed = {"\ud800" if piece == "a" else piece: number for piece, number in IDS.items()}
        with pytest.raises(RearError, match=r"has no id for 'a'"):
            load(str(write_json(tmp_path, vocab=renamed)))

    def test_that_are_no_text_or_too_long(self, tmp_path, monkeypatch):
        file = write_gz(tmp_path)
        whole = file.read_bytes()
        for broken in (b"", whole[:50], b"no gzip at all", whole[:40] + b"\x00" * 20 + whole[60:]):
            file.write_bytes(broken)
            with pytest.raises(RearError, match=r"txt\.gz"):
                load(str(file))
        file.write_bytes(gzip.compress(b" " * (clip_vocabulary.MOST_BYTES + 1)))
        with pytest.raises(RearError, match=r"is no list of merges \(more than \d+ bytes unzipped\)"):
            load(str(file))
