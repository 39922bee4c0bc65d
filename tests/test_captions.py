"""Caption files: padding, and what is refused."""

import numpy as np
import pytest

from rear_jax.data.captions import CaptionFile
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
