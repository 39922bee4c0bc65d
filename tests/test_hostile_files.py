"""Damaged and hostile files of weights: one line or the right values, bounded memory and time.

Each kind that was found by hand has a test here; `test_damaged_files.py` changes valid files at random.
"""

import io
import os
import struct
import time
import tracemalloc
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.metrics import inception
from rear_jax.runtime import array_files, files
from rear_jax.weights import layout, torch_writer
from rear_jax.weights.torch_files import read_tensors
from tests.hostile import VALUES, bounded, everything, write
from tests.test_torch_files import DATA, Torch, write_zip

STORAGE = ("storage", Torch.Global("torch", "FloatStorage"), "0", "cpu", 4)
REBUILD = Torch.Global("torch._utils", "_rebuild_tensor_v2")


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (7,), (3_000_000,), (1500, 2000), (3, 3, 300, 400)])
@pytest.mark.parametrize("view", ["whole", "transposed", "every second"])
def test_one_nan_is_found_in_every_layout(shape, dtype, view):
    whole = np.zeros(shape, dtype)
    value = {"whole": whole, "transposed": whole.T, "every second": whole[..., ::2] if shape else whole}[view]
    layout.require_finite(value, "w", "x.pt")
    value[(-1,) * value.ndim] = np.nan
    with pytest.raises(RearError, match=r"x\.pt: w is not finite"):
        layout.require_finite(value, "w", "x.pt")


def test_an_empty_tensor_is_finite():
    layout.require_finite(np.zeros((0, 4), np.float32), "w", "x.pt")


def test_the_search_for_nan_takes_little_memory_and_time():
    """A long vector is not searched value by value, and a view in another order is not copied."""
    value = np.zeros((4000, 16_000), np.float32).T
    tracemalloc.start()
    since = time.process_time()
    layout.require_finite(value, "w", "x.pt")
    layout.require_finite(np.zeros(4_000_000, np.float16), "w", "x.pt")
    seconds, (_, peak) = time.process_time() - since, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * 2**20
    assert seconds < 2


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


def test_keys_that_are_not_printable_are_escaped(tmp_path):
    path = write_zip(tmp_path / "a.pt", {"w\x1b[31m\n": Torch.tensor()})
    with pytest.raises(RearError, match=r"unexpected: w\\x1b\[31m\\n"):
        layout.from_torch(read_tensors(path), {}, lambda path: layout.TorchName(path[0]))
