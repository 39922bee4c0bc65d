"""Valid files of every format that holds weights or arrays, changed at random: the right values, or one line."""

import io
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from rear_jax.errors import RearError
from rear_jax.runtime import array_files
from rear_jax.weights.torch_files import read_tensors
from tests.hostile import VALUES, bounded, everything, npy, npz, write
from tests.test_torch_files import DATA


def valid_files() -> dict[str, bytes]:
    """A small valid file of each format."""
    torch = [DATA / name for name in ("state_dict_zip.pt", "train_state_legacy.pt")]
    tensors = {"a": VALUES, "b": VALUES.astype(ml_dtypes.bfloat16)}
    with zipfile.ZipFile(torch[0]) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    return {
        "data.pkl": pickled,
        **{path.name: path.read_bytes() for path in torch},
        "a.safetensors": save(tensors),
        "a.npz": npz(a=VALUES, b=np.arange(3)),
        "a.npy": npy("(4, 2)", data=b"12345678"),
    }


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with some flipped bits, cut out, doubled or spliced parts, or other numbers."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place, other = (draw(st.integers(0, len(content))) for _ in range(2))
        start, stop = sorted((place, min(other, place + 64)))
        kind = draw(st.sampled_from(["flip", "cut", "end", "double", "move", "number"]))
        if kind == "flip" and place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[start:stop]
        elif kind == "end":
            del content[place:]
        elif kind == "double":
            content[start:start] = content[start:stop]
        elif kind == "move":
            content[other : other + stop - start] = content[start:stop]
        else:
            number = draw(st.sampled_from([0, 1, -1, 1 << 31, (1 << 63) - 1, 1 << 40]))
            width = draw(st.sampled_from([1, 2, 4, 8]))
            content[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(content)


def read_any(path: Path, section: str = "") -> dict[str, np.ndarray]:
    if path.suffix == ".npy":
        return {"": array_files.read_npy(path, "x")}
    if path.suffix != ".npz":
        return dict(read_tensors(path, section)) if section else everything(path)
    with array_files.open_npz(path, "x") as arrays:
        return {name: arrays.read(name) for name in arrays.members}


def with_pickle(pickled: bytes) -> bytes:
    """`state_dict_zip.pt` with another pickle and the right checksums."""
    stream = io.BytesIO()
    with zipfile.ZipFile(DATA / "state_dict_zip.pt") as whole, zipfile.ZipFile(stream, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    return stream.getvalue()


def fuzz(folder: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(damaged(valid_files()[name]))
    path = write(folder / name, with_pickle(content) if name == "data.pkl" else content)
    section = data.draw(st.sampled_from(["", "model", "a"]))
    assert isinstance(bounded(lambda: read_any(path, section)), RearError | dict)


IN_ONE_FOLDER = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]


@pytest.mark.parametrize("name", valid_files())
@hypothesis.settings(deadline=None, max_examples=150, suppress_health_check=IN_ONE_FOLDER)
@hypothesis.given(data=st.data())
def test_damage_gives_one_line_or_values(tmp_path, name, data):
    fuzz(tmp_path, name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", valid_files())
@hypothesis.settings(deadline=None, max_examples=5000, suppress_health_check=IN_ONE_FOLDER)
@hypothesis.given(data=st.data())
def test_damage_gives_one_line_or_values_at_length(tmp_path, name, data):
    fuzz(tmp_path, name, data)
