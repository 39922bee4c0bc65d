"""Damaged and hostile `.npz` and `.npy` files: one line or the right values, bounded memory and time."""

import ml_dtypes
import numpy as np
import pytest

from rear_jax.errors import RearError
from rear_jax.runtime import array_files
from tests.hostile import VALUES, bounded, member, npy, npz, write


def changed(content: bytes, before: bytes, after: bytes) -> bytes:
    assert before in content
    return content.replace(before, after)


WHOLE = npz(a=VALUES)
BAD_NPZ = {
    "cut": WHOLE[:-30],
    "empty": b"",
    "plain_npy": npy("(4,)", data=b"1234"),
    "claims_1e13": member(npy("(10000000000000,)")),
    "negative": member(npy("(-1,)")),
    "bool_size": member(npy("(True,)", data=b"1")),
    "float_size": member(npy("(1.0,)", data=b"1")),
    "objects": member(npy("(1,)", "|O", b"12345678")),
    "no_width": member(npy("(10000000000000,)", "|S0")),
    "deep": member(npy("(" * 4000 + ")" * 4000)),
    "text_member": member(b"hello", "a"),
    "text_in_npy": member(b"hello"),
    "dense": member(npy("(1000000000,)", data=b"\0" * 1000)),
    "encrypted": changed(WHOLE, b"-\0\0\0\x08\0", b"-\0\x01\0\x08\0"),
    "unknown_compression": changed(WHOLE, b"-\0\0\0\x08\0", b"-\0\0\0\x63\0"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_damaged_npz(tmp_path, name):
    path = write(tmp_path / "x.npz", BAD_NPZ[name])

    def read():
        with array_files.open_npz(path, "fetch it again") as arrays:
            return arrays.read("a")

    found = bounded(read)
    assert isinstance(found, RearError)
    assert "x.npz cannot be read" in str(found)


@pytest.mark.parametrize("read", [array_files.read_npy, array_files.map_npy])
def test_npy(tmp_path, read):
    np.save(tmp_path / "a.npy", np.asfortranarray(VALUES))
    np.testing.assert_array_equal(read(tmp_path / "a.npy", "x"), VALUES)
    np.save(tmp_path / "b.npy", VALUES.astype(ml_dtypes.bfloat16))
    assert read(tmp_path / "b.npy", "x").dtype == ml_dtypes.bfloat16
    for content in (npy("(10000000000000,)"), npy("(4,)", data=b"123"), b"", b"PK\x03\x04", WHOLE):
        path = write(tmp_path / "c.npy", content)
        assert isinstance(bounded(lambda path=path: read(path, "x")), RearError)
