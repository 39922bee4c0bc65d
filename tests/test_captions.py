"""Captions by number: files of anybody's, and what `--job=caption` writes."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from rear_jax.data import caption_shards
from rear_jax.data.caption_shards import CaptionsHeader, Rows, write_captions
from rear_jax.data.captions import CaptionFile, open_captions
from rear_jax.errors import RearError

FEATURES = np.arange(1, 13, dtype=np.float16).reshape(2, 3, 2)


def read_captions(path, *, length, dim):
    return CaptionFile(path, option="config.sample.captions", length=length, dim=dim)[:]


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_captions_end_at_the_right(tmp_path):
    mask = np.array([[1, 1, 0], [0, 1, 0]])  # padded on the right, as text encoders do, and oddly
    file = write(tmp_path / "c.npz", features=FEATURES, mask=mask)
    features, mask = read_captions(file, length=4, dim=2)
    assert features.dtype == np.float32
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[False, False, True, True], [False, False, False, True]])
    np.testing.assert_array_equal(features[0], [[0, 0], [0, 0], [1, 2], [3, 4]])
    np.testing.assert_array_equal(features[1], [[0, 0], [0, 0], [0, 0], [9, 10]])


def test_a_file_padded_on_the_left_stays_as_it_is(tmp_path):
    features = np.where([[[0], [0], [1]], [[1], [1], [1]]], FEATURES, 0)
    file = write(tmp_path / "c.npz", features=features, mask=np.array([[0, 0, 1], [1, 1, 1]], bool))
    read, mask = read_captions(file, length=3, dim=2)
    np.testing.assert_array_equal(read, features)
    np.testing.assert_array_equal(mask, [[False, False, True], [True, True, True]])


def test_padding_may_hold_anything(tmp_path):
    features = FEATURES.copy()
    features[:, 0] = np.nan
    file = write(tmp_path / "c.npz", features=features, mask=np.array([[0, 1, 1]] * 2))
    assert np.isfinite(read_captions(file, length=3, dim=2).features).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": FEATURES}, "mask"),
        ({"features": FEATURES[0], "mask": np.ones((2, 3))}, "at most 3, 2"),
        ({"features": FEATURES[:, :, :1], "mask": np.ones((2, 3))}, "at most 3, 2"),
        ({"features": FEATURES.repeat(2, axis=1), "mask": np.ones((2, 6))}, "at most 3, 2"),
        ({"features": FEATURES[:0], "mask": np.ones((0, 3))}, "at most 3, 2"),
        ({"features": FEATURES, "mask": np.ones((2, 2))}, r"mask is \(2, 2\), wanted \(2, 3\)"),
        ({"features": FEATURES, "mask": [[1, 1, 1], [0, 0, 0]]}, "caption 1 is all padding"),
        ({"features": FEATURES * np.nan, "mask": np.ones((2, 3))}, "not finite"),
        ({"features": np.array([None]), "mask": np.ones((2, 3))}, "does not hold captions"),
    ],
)
def test_refusals(tmp_path, arrays, message):
    with pytest.raises(RearError, match=message):
        read_captions(write(tmp_path / "c.npz", **arrays), length=3, dim=2)


def test_no_file_or_another(tmp_path):
    for path in ("", str(tmp_path / "none.npz")):
        with pytest.raises(RearError, match=r"config.sample.captions = "):
            read_captions(path, length=3, dim=2)
    (tmp_path / "c.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(RearError, match="does not hold captions"):
        read_captions(str(tmp_path / "c.npz"), length=3, dim=2)
    np.save(tmp_path / "c.npy", FEATURES)
    with pytest.raises(RearError, match="does not hold captions"):
        read_captions(str(tmp_path / "c.npy"), length=3, dim=2)


def test_a_folder_gives_what_an_npz_does_by_number(tmp_path):
    mask = np.array([[1, 1, 0], [0, 1, 0]])
    np.save(tmp_path / "features.npy", FEATURES)
    np.save(tmp_path / "mask.npy", mask)
    whole = read_captions(write(tmp_path / "c.npz", features=FEATURES, mask=mask), length=4, dim=2)
    folder = CaptionFile(str(tmp_path), option="config.captions_from", length=4, dim=2)
    assert len(folder) == 2
    for part, wanted in zip(folder[np.array([1, 0, 1])], whole, strict=True):
        np.testing.assert_array_equal(part, wanted[[1, 0, 1]])


HEADER = CaptionsHeader(
    num_captions=11, length=4, dim=3, dtype="bfloat16", encoder="e", captions="c", source="pairs", split="train"
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(caption_shards, "CAPTIONS_OF_SHARD", 4)


def features_of(number: int) -> np.ndarray:
    """One to four features of a caption, that bfloat16 holds."""
    return np.full((1 + number % 4, 3), float(number)) + np.arange(3) / 16


def encode(start: int, stop: int):
    """Two captions at a time, at the left or at the right end."""
    for first in range(start, stop, 2):
        numbers = range(first, min(first + 2, stop))
        rows = Rows(np.full((len(numbers), 4, 3), 7.0), np.zeros((len(numbers), 4), bool))
        for row, number in enumerate(numbers):
            found = features_of(number)
            place = slice(0, len(found)) if number % 2 else slice(4 - len(found), 4)
            rows.features[row, place], rows.mask[row, place] = found, True
        yield rows


def write_shards(folder, header=HEADER, encode_range=encode, **processes):
    done = []
    write_captions(folder, header, encode_range, progress=done.append, **processes)
    return done


def opened(folder, length=6):
    return open_captions(str(folder), option="config.captions_from", length=length, dim=3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shards_give_back_captions_by_number(tmp_path, dtype):
    assert write_shards(tmp_path, dataclasses.replace(HEADER, dtype=dtype)) == [3, 7, 11]
    captions = opened(tmp_path)
    assert len(captions) == 11
    numbers = np.array([10, 0, 3, 10])
    features, mask = captions[numbers]
    assert features.dtype == np.float32
    for row, number in enumerate(numbers):
        wanted = features_of(number)
        np.testing.assert_array_equal(mask[row], np.arange(6) >= 6 - len(wanted))
        np.testing.assert_array_equal(features[row][mask[row]], wanted)
        assert not features[row][~mask[row]].any()
    for part, whole in zip(captions[2:5], captions[:], strict=True):
        np.testing.assert_array_equal(part, whole[2:5])
    stored = sum(file.stat().st_size - 128 for file in tmp_path.glob("features-*"))
    assert stored == sum(len(features_of(n)) for n in range(11)) * 3 * (2 if dtype == "bfloat16" else 4)


def test_shards_that_are_there_are_not_written_again(tmp_path):
    write_shards(tmp_path)
    before = opened(tmp_path)[:]
    (tmp_path / "header.json").rename(tmp_path / "header.json.partial")
    (tmp_path / "counts-00001-of-00003.npy").unlink()
    asked = []

    def noted(start, stop):
        asked.append((start, stop))
        return encode(start, stop)

    write_shards(tmp_path, encode_range=noted)
    assert asked == [(3, 7)]
    for old, new in zip(before, opened(tmp_path)[:], strict=True):
        np.testing.assert_array_equal(old, new)


def test_two_processes_write_what_one_does(tmp_path):
    write_shards(tmp_path / "one")
    for process in (0, 1):
        write_shards(tmp_path / "two", process_index=process, process_count=2)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_another_encoder_is_refused(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(RearError, match="was begun with encoder 'e', not 'other'"):
        write_shards(tmp_path, dataclasses.replace(HEADER, encoder="other"))


def test_what_is_damaged_or_unfinished_is_named(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(RearError, match=r"features are \[at most 4, 3\], this generator takes \[at most 3, 3\]"):
        opened(tmp_path, length=3)
    with pytest.raises(RearError, match="none has the number 11"):
        opened(tmp_path)[np.array([2, 11])]
    features = tmp_path / "features-00002-of-00003.npy"
    features.write_bytes(features.read_bytes()[:-2])
    with pytest.raises(RearError, match=r"features-00002-of-00003.npy is missing or damaged"):
        opened(tmp_path)
    write_shards(tmp_path)
    assert len(opened(tmp_path)) == 11
    (tmp_path / "header.json").write_text('{"num_captions": 1e9}')
    with pytest.raises(RearError, match=r"header.json is damaged"):
        opened(tmp_path)
    (tmp_path / "header.json").rename(tmp_path / "header.json.partial")
    with pytest.raises(RearError, match="is not finished"):
        opened(tmp_path)


def test_features_that_are_no_numbers_or_of_another_width_are_refused(tmp_path):
    def broken(start, stop):
        for rows in encode(start, stop):
            yield rows._replace(features=rows.features * np.nan)

    with pytest.raises(RearError, match="not finite"):
        write_shards(tmp_path / "nan", encode_range=broken)
    with pytest.raises(RearError, match="other sizes"):
        write_shards(tmp_path / "wide", dataclasses.replace(HEADER, dim=2))
    assert not (tmp_path / "wide" / "header.json").exists()


def test_bfloat16_rounds_as_everywhere(tmp_path):
    def thirds(start, stop):
        for rows in encode(start, stop):
            yield rows._replace(features=rows.features / 3)

    write_shards(tmp_path, encode_range=thirds)
    features, mask = opened(tmp_path)[np.array([5])]
    np.testing.assert_array_equal(features[mask], (features_of(5) / 3).astype(ml_dtypes.bfloat16).astype(np.float32))
