"""Damaged and hostile files of every format that is read here: one line or the right values, bounded memory and time.

Each kind that was found by hand has a test; beside them valid files are changed at random.
"""

import io
import os
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from rear_jax.errors import RearError
from rear_jax.metrics import inception
from rear_jax.runtime import array_files, files
from rear_jax.weights import layout, shards, torch_writer
from rear_jax.weights.torch_files import read_tensors
from tests.test_torch_files import DATA, Torch, write_zip

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
STORAGE = ("storage", Torch.Global("torch", "FloatStorage"), "0", "cpu", 4)
REBUILD = Torch.Global("torch._utils", "_rebuild_tensor_v2")
MOST = 64 << 20  # bytes that reading a file of some kB may take
LONGEST = 5.0  # seconds


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def legacy(value: bytes) -> bytes:
    """An older file up to its fourth pickle."""
    start = (DATA / "train_state_legacy.pt").read_bytes()
    return start[: start.index(b".", 2) + 1] + Torch.dumps(1001) + Torch.dumps({"little_endian": True}) + value


def tensor(storage: bytes, **changes: Any) -> bytes:
    """Opcodes of a call that makes a tensor of a storage."""
    given = {"offset": 0, "size": (4,), "stride": (1,)} | changes
    arguments = b"".join(Torch._encode(part) for part in (*given.values(), False, {}))
    return Torch._encode(REBUILD) + b"(" + storage + arguments + b"tR"


def zip_of(pickled: bytes, *, elements: int = 4) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 4 * elements)
    return stream.getvalue()


def bounded(read: Callable[[], Any]) -> Any:
    """What a function gives, or its RearError; fails on other errors, on two lines, and beyond LONGEST and MOST."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        found = read()
    except RearError as error:
        found = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert not isinstance(found, RearError) or "\n" not in str(found)
    assert time.monotonic() - begun < LONGEST
    assert peak < MOST
    return found


def everything(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; their outline must say what they are."""
    tensors = shards.open_weights(path)
    shapes = layout.outline(tensors)
    found = {key: np.array(value) for key, value in tensors.items()}
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    return found


NESTED = b"N" + b"\x85" * 50_000  # a tuple in a tuple in a tuple
DOUBLING = b"K\x01" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200))
BAD_PICKLES = {
    "nested_key": b"\x80\x02}" + NESTED + b"K\x01s.",
    "nested_value": b"\x80\x02}X\x01\0\0\0a" + NESTED + b"s.",
    "doubling_key": b"\x80\x02}" + DOUBLING + b"K\x01s.",
    "doubling_reference": b"\x80\x02" + DOUBLING + b"Q.",
    "doubling_storage": b"\x80\x02(" + DOUBLING + b"K\x01K\x02K\x03K\x04tQ.",
    "memo_without_end": b"\x80\x02Nr\xff\xff\xff\xff.",
    "text_without_end": b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytes_without_end": b"\x80\x02B\xff\xff\xff\x7f.",
    "frame_without_end": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "number_of_negative_length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "mark_alone": b"\x80\x02(.",
    "nothing": b"\x80\x02.",
    "name_changed": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "unknown_opcode": b"\x80\x02\xfe.",
}


@pytest.mark.parametrize("name", BAD_PICKLES)
@pytest.mark.parametrize("wrap", [zip_of, legacy])
def test_pickles_that_expand_or_nest_are_refused(tmp_path, name, wrap):
    path = write(tmp_path / "a.pt", wrap(BAD_PICKLES[name]))
    assert isinstance(bounded(lambda: read_tensors(path)), RearError)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (float("nan"),)},
        {"size": (2.0, 2)},
        {"size": (True,)},
        {"size": (-4,)},
        {"size": (1 << 63,)},
        {"size": (0, 1 << 47, 1 << 47)},
        {"size": (1,) * 40, "stride": (1,) * 40},
        {"size": (1 << 20, 1 << 20), "stride": (0, 0)},  # one number over and over
        {"size": (1 << 20,), "stride": (0,)},
        {"stride": (float("nan"),)},
        {"stride": (1 << 80,)},
        {"stride": (1, 1)},
        {"offset": float("nan")},
        {"offset": False},
        {"offset": 1 << 64},
        {"size": [4]},
        {"size": "4"},
    ],
)
def test_windows_are_of_integers_inside_their_storage(tmp_path, changes):
    pickled = b"\x80\x02}X\x01\0\0\0w" + tensor(Torch._encode(STORAGE) + b"Q", **changes) + b"s."
    path = write(tmp_path / "a.pt", zip_of(pickled))
    assert "not a whole checkpoint" in str(bounded(lambda: read_tensors(path)))


@pytest.mark.parametrize("step", [0, 7, 1 << 47])
def test_steps_that_are_never_taken_do_not_matter(tmp_path, step):
    pickled = b"\x80\x02}X\x01\0\0\0w" + tensor(Torch._encode(STORAGE) + b"Q", size=(1, 4), stride=(step, 1)) + b"s."
    assert everything(write(tmp_path / "a.pt", zip_of(pickled)))["w"].shape == (1, 4)


@pytest.mark.parametrize(
    "pid",
    [
        (*STORAGE[:4], 4.0),
        (*STORAGE[:4], True),
        (*STORAGE[:4], 3),
        (*STORAGE[:4], 5),
        (*STORAGE[:2], ("0",), "cpu", 4),
        ("storage", "torch.FloatStorage", "0", "cpu", 4),
        (*STORAGE, ("v", -1, 4)),
        (*STORAGE, ("v", 0, 5)),
        (*STORAGE, ("v", 1, 4)),
        (*STORAGE, ("v", 0.0, 4)),
        STORAGE[:4],
    ],
)
def test_storages_are_what_they_claim(tmp_path, pid):
    pickled = b"\x80\x02}X\x01\0\0\0w" + tensor(Torch._encode(pid) + b"Q") + b"s."
    path = write(tmp_path / "a.pt", zip_of(pickled))
    assert "not a whole checkpoint" in str(bounded(lambda: read_tensors(path)))


def test_a_flipped_byte_in_a_storage_is_found(tmp_path):
    torch_writer.write(tmp_path / "a.bin", {"w": VALUES}, [VALUES])
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[content.index(VALUES.tobytes()) + 5] ^= 1
    tensors = read_tensors(write(tmp_path / "b.bin", bytes(content)))
    with pytest.raises(RearError, match="checksum of storage 0"):
        tensors["w"]


def test_a_packed_pickle_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N" * (1 << 26))
    assert "compressed" in str(bounded(lambda: read_tensors(tmp_path / "a.pt")))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)])
def test_only_regular_files_are_opened(tmp_path, make):
    for name in ("a.pt", "a.safetensors", "a.npz"):
        make(tmp_path / name)
        read = array_files.open_npz(tmp_path / name, "x").__enter__ if name == "a.npz" else None
        assert isinstance(bounded(read or (lambda name=name: read_tensors(tmp_path / name))), RearError)
    assert isinstance(bounded(lambda: read_tensors("/dev/zero")), RearError)


def test_a_pipe_in_a_folder_is_found(tmp_path):
    (tmp_path / "a").mkdir()
    assert files.irregular_in(tmp_path) is None
    os.mkfifo(tmp_path / "a" / "pipe")
    assert files.irregular_in(tmp_path) == str(tmp_path / "a" / "pipe")


def test_objects_of_training_scripts_are_left_out(tmp_path):
    made = [  # class, and what its object is made of
        ("argparse", "Namespace"),
        ("pathlib", "PosixPath"),
        ("my.package", "Config"),
        ("omegaconf.dictconfig", "DictConfig"),
    ]
    objects = b"".join(
        Torch._encode(name) + Torch._encode(Torch.Global(*name_of)) + b")\x81}b" + b"s"
        for name, name_of in zip("abcd", made, strict=True)
    )
    call = Torch._encode("e") + Torch._encode(Torch.Call(Torch.Global("numpy.core.multiarray", "scalar"), 1)) + b"s"
    weights = Torch._encode("model") + b"}" + Torch._encode("w") + tensor(Torch._encode(STORAGE) + b"Q") + b"ss"
    path = write(tmp_path / "a.pt", zip_of(b"\x80\x02}" + objects + call + weights + b"."))
    assert everything(path).keys() == {"w"}


@pytest.mark.parametrize("name", ["posix.system", "builtins.exec", "subprocess.Popen", "torch.hub.load", "copyreg.x"])
@pytest.mark.parametrize("opcode", [b"R", b"\x81"])
def test_names_that_no_checkpoint_needs_are_refused(tmp_path, name, opcode):
    module, _, what = name.rpartition(".")
    hostile = b"\x80\x02" + Torch._encode(Torch.Global(module, what)) + b")" + opcode + b"."
    with pytest.raises(RearError, match=f"{name}, which is refused"):
        read_tensors(write(tmp_path / "a.pt", zip_of(hostile)))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_all_keys_are_left_out(tmp_path, prefix):
    tensors = {"a": VALUES, "b.module.c": VALUES}
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    assert everything(tmp_path / "a.safetensors").keys() == tensors.keys()
    save_file({prefix + "a": VALUES, "b": VALUES}, tmp_path / "b.safetensors")
    assert everything(tmp_path / "b.safetensors").keys() == {prefix + "a", "b"}


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64])
def test_weights_are_floats(dtype):
    shapes = {"w": np.zeros((4, 6), np.float32)}
    with pytest.raises(RearError, match=f"1 of no floats: w {np.dtype(dtype)}"):
        layout.from_torch({"w": VALUES.astype(dtype)}, shapes, lambda path: layout.TorchName(path[0]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_weights_are_finite(value):
    changed = VALUES.astype(np.float64)
    changed[2, 3] = value
    with pytest.raises(RearError, match="w is not finite"):
        layout.from_torch({"w": changed}, {"w": VALUES}, lambda path: layout.TorchName(path[0]))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_is_taken(dtype):
    found = layout.from_torch({"w": VALUES.astype(dtype)}, {"w": VALUES}, lambda path: layout.TorchName(path[0]))
    np.testing.assert_array_equal(found["w"], VALUES)


def test_float8_is_named(tmp_path):
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    path = write(tmp_path / "a.safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4)
    tensors = read_tensors(path)
    assert layout.outline(tensors)["w"].shape == (4,)
    with pytest.raises(RearError, match="w is of type F8_E4M3, which cannot be read here"):
        tensors["w"]


def test_shapes_are_compared_before_convolutions_are_folded(tmp_path):
    """A number that repeats itself is never unrolled."""
    large = np.broadcast_to(np.float32(1), (1 << 20, 1 << 20))
    norm = {f"Conv2d_1a_3x3.bn.{part}": np.ones(32, np.float32) for part in layout.BATCH_NORM}
    given = norm | {"Conv2d_1a_3x3.conv.weight": large}
    assert isinstance(bounded(lambda: inception.params_from(given)), RearError)


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def npy(shape: str, descr: str = "|u1", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def member(content: bytes, name: str = "a.npy", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


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


def read_any(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".npy":
        return {"": array_files.read_npy(path, "x")}
    if path.suffix != ".npz":
        return everything(path)
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
    found = bounded(lambda: read_any(path))
    assert isinstance(found, RearError | dict)


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


def test_keys_that_are_not_printable_are_escaped(tmp_path):
    path = write_zip(tmp_path / "a.pt", {"w\x1b[31m\n": Torch.tensor()})
    with pytest.raises(RearError, match=r"unexpected: w\\x1b\[31m\\n"):
        layout.from_torch(read_tensors(path), {}, lambda path: layout.TorchName(path[0]))
