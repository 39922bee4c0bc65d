"""PyTorch and safetensors files without PyTorch: every dtype and layout, and nothing that could run code.

The files in tests/data were written by `torch.save` of PyTorch 2.13 from the tensors that `EXPECTED` spells out:
`state_dict_zip.pt` is a flat state dict; `train_state_legacy.pt` holds it under "model" beside an optimizer's state,
with `_use_new_zipfile_serialization=False`.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rear_jax.errors import RearError
from rear_jax.weights import layout, torch_writer
from rear_jax.weights.torch_files import read_tensors

DATA = Path(__file__).parent / "data"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6) / 8
EXPECTED = {
    "contiguous": BASE,
    "transposed": BASE.T,
    "column": BASE[:, 2],
    "tail": BASE[2:],
    "strided": BASE[::2, 1::2],
    "expanded": np.array([[1.5] * 3, [-2.0] * 3], np.float32),
    "half": np.array([1.5, -0.25], np.float16),
    "bfloat16": np.array([3.0, -0.5, 1e30], ml_dtypes.bfloat16),
    "double": np.array([1 / 3]),
    "long": np.array([-5, 1 << 40]),
    "int": np.array([7], np.int32),
    "byte": np.array([0, 255], np.uint8),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.array([1.0, 2.0], np.float32),
}
FILES = ["state_dict_zip.pt", "train_state_legacy.pt"]


@pytest.mark.parametrize("name", FILES)
def test_every_dtype_and_layout_of_a_real_file(name):
    tensors = read_tensors(DATA / name)
    assert tensors.keys() == EXPECTED.keys()
    for key, expected in EXPECTED.items():
        assert tensors[key].dtype == expected.dtype, key
        np.testing.assert_array_equal(tensors[key], expected, err_msg=key)


@pytest.mark.parametrize("name", FILES)
def test_an_absent_key_is_a_key_error(name):
    with pytest.raises(KeyError, match="absent"):
        read_tensors(DATA / name)["absent"]


def test_safetensors(tmp_path):
    written = {"a": BASE, "b": np.array([1, -2], ml_dtypes.bfloat16), "c": np.array([3])}
    save_file(written, tmp_path / "a.safetensors")
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert tensors.keys() == written.keys()
    for key in written:
        assert tensors[key].dtype == written[key].dtype
        np.testing.assert_array_equal(tensors[key], written[key])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.97])
def test_truncated_files_are_refused(tmp_path, name, share):
    whole = (DATA / name).read_bytes()
    cut = tmp_path / name
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(RearError, match=r"not a whole checkpoint.*fetch it again"):
        read_tensors(cut)


def test_truncated_safetensors_is_refused(tmp_path):
    save_file({"a": BASE}, tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-8])
    with pytest.raises(RearError, match=r"cut\.safetensors is not a whole checkpoint"):
        read_tensors(cut)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    with pytest.raises(RearError, match="not a whole checkpoint"):
        read_tensors(path)


def test_missing_file():
    with pytest.raises(RearError, match=r"no checkpoint file nowhere\.pt"):
        read_tensors("nowhere.pt")


class Torch:
    """Writes the pickle of a torch zip file without torch: persistent ids for storages, globals by name."""

    class Storage:
        def __init__(self, key: str, length: int):
            self.pid = ("storage", Torch.Global("torch", "FloatStorage"), key, "cpu", length)

    class Global:
        def __init__(self, module: str, name: str):
            self.module, self.name = module, name

    class Call:
        def __init__(self, function: "Torch.Global", *arguments: object):
            self.function, self.arguments = function, arguments

    @staticmethod
    def tensor(length: int = 4, offset: int = 0, size: tuple = (4,), stride: tuple = (1,)) -> "Torch.Call":
        rebuild = Torch.Global("torch._utils", "_rebuild_tensor_v2")
        return Torch.Call(rebuild, Torch.Storage("0", length), offset, size, stride, False, OrderedDict())

    @staticmethod
    def dumps(value: object) -> bytes:
        """A protocol 2 pickle: opcodes by hand for the three classes above and for containers, pickle for the rest."""
        return pickle.PROTO + b"\x02" + Torch._encode(value) + pickle.STOP

    @staticmethod
    def _encode(value: object) -> bytes:
        if isinstance(value, Torch.Global):
            return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
        if isinstance(value, Torch.Storage):
            return Torch._encode(value.pid) + pickle.BINPERSID
        if isinstance(value, Torch.Call):
            return Torch._encode(value.function) + Torch._encode(tuple(value.arguments)) + pickle.REDUCE
        if isinstance(value, tuple):
            return pickle.MARK + b"".join(map(Torch._encode, value)) + pickle.TUPLE
        if isinstance(value, dict):
            items = b"".join(Torch._encode(k) + Torch._encode(v) for k, v in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
        return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def write_zip(
    path: Path, value: object, *, compression: int = zipfile.ZIP_STORED, byteorder: bytes = b"little"
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", Torch.dumps(value))
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    return path


@pytest.mark.parametrize(
    "section", ["model", "module", "state_dict", "model_state_dict", "ema", "ema_model", "model_ema"]
)
def test_one_section_is_descended_into(tmp_path, section):
    path = write_zip(tmp_path / "a.pt", {"step": 3, section: {"w": Torch.tensor(), "steps": 7}, "args": {"lr": 0.1}})
    tensors = read_tensors(path)
    assert tensors.keys() == {"w"}
    np.testing.assert_array_equal(tensors["w"], [1, 2, 3, 4])


def test_the_model_is_taken_before_its_average_and_the_log_says_so(tmp_path, caplog):
    path = write_zip(tmp_path / "a.pt", {"ema": {"w": Torch.tensor()}, "model": {"v": Torch.tensor()}})
    assert read_tensors(path).keys() == {"v"}
    assert "holds the state dicts model, ema: taking model" in caplog.text


def test_a_section_may_lie_in_another(tmp_path):
    optimizer = {"state": {0: {"exp_avg": Torch.tensor()}}}
    path = write_zip(
        tmp_path / "a.pt", {"optimizer": optimizer, "state_dict": {"epoch": 3, "model": {"w": Torch.tensor()}}}
    )
    assert read_tensors(path).keys() == {"w"}
    deeper = {"model": {"model": {"model": {"w": Torch.tensor()}}}}
    with pytest.raises(RearError, match=r"\(it holds model\); save one"):
        read_tensors(write_zip(tmp_path / "b.pt", deeper))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"step": 3}, r"\(it holds step\)"),
        ({"optimizer": {"state": {0: {"exp_avg": Torch.tensor()}}}, "epoch": 1}, r"\(it holds optimizer, epoch\)"),
        ([1, 2], "ema_model, model_ema; save one"),
        ({"weights": {}}, r"\(it holds weights\)"),
    ],
)
def test_no_state_dict(tmp_path, value, message):
    with pytest.raises(RearError, match=f"no state dict.*{message}"):
        read_tensors(write_zip(tmp_path / "a.pt", value))


def test_float8_is_refused_by_name(tmp_path):
    storage = Torch.Global("torch.storage", "UntypedStorage")
    rebuild, dtype = Torch.Global("torch._utils", "_rebuild_tensor_v3"), Torch.Global("torch", "float8_e4m3fn")
    tensor = Torch.Call(rebuild, storage, 0, (4,), (1,), False, OrderedDict(), dtype)
    with pytest.raises(RearError, match=r"has tensors of float8 or a newer type, .*: save them as bfloat16"):
        read_tensors(write_zip(tmp_path / "a.pt", {"w": tensor}))
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    outline = layout.outline(read_tensors(tmp_path / "a.safetensors"))
    with pytest.raises(RearError, match=r"a: w is float8_e4m3fn, which cannot be read here: save the file as bfloat16"):
        layout.require_fit(outline, {"w": np.zeros(4)}, lambda path: layout.TorchName(path[0]), source="a")


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch.nn.modules.linear", "Linear"), ("torch", "load")],
)
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, module, name):
    marker = tmp_path / "ran"
    hostile = {"w": Torch.tensor(), "x": Torch.Call(Torch.Global(module, name), f"touch {marker}")}
    with pytest.raises(RearError, match=rf"{module}\.{name}, which is refused"):
        read_tensors(write_zip(tmp_path / "a.pt", hostile))
    legacy = tmp_path / "legacy.pt"
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    legacy.write_bytes(magic + Torch.dumps(1001) + Torch.dumps({"little_endian": True}) + Torch.dumps(hostile))
    with pytest.raises(RearError, match=rf"{module}\.{name}, which is refused"):
        read_tensors(legacy)
    assert not marker.exists()


@pytest.mark.parametrize(
    "tensor",
    [
        Torch.tensor(size=(5,)),  # beyond the storage
        Torch.tensor(offset=1),
        Torch.tensor(size=(2, 2), stride=(3, 1)),
        Torch.tensor(offset=-1, size=(1,)),
        Torch.tensor(stride=(-1,)),
        Torch.tensor(length=400, size=(400,)),  # the storage claims more than the file has
        Torch.Call(Torch.Global("torch._utils", "_rebuild_tensor_v2"), "not a storage", 0, (1,), (1,), False, {}),
        Torch.Call(Torch.Global("torch", "FloatStorage"), 3),
    ],
)
def test_windows_outside_the_file_are_refused(tmp_path, tensor):
    with pytest.raises(RearError, match="not a whole checkpoint"):
        read_tensors(write_zip(tmp_path / "a.pt", {"w": tensor}))
    header = b'{"w":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    outline = layout.outline(read_tensors(tmp_path / "a.safetensors"))
    with pytest.raises(RearError, match=r"a: w is float8_e4m3fn, which cannot be read here: save the file as bfloat16"):
        layout.require_fit(outline, {"w": np.zeros(4)}, lambda path: layout.TorchName(path[0]), source="a")


def test_state_set_on_admitted_names_does_nothing_lasting(tmp_path):
    """BUILD with a slot state calls setattr on what a name resolved to; it must meet nothing that can be changed."""
    names = [("collections", "OrderedDict"), ("torch", "FloatStorage"), ("torch._utils", "_rebuild_tensor_v2")]
    for module, name in names:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            state = Torch._encode((None, {"__defaults__": (1,)}))
            archive.writestr("a/data.pkl", b"\x80\x02" + Torch._encode(Torch.Global(module, name)) + state + b"b.")
        path = tmp_path / "a.pt"
        path.write_bytes(stream.getvalue())
        with pytest.raises(RearError, match="not a whole checkpoint"):
            read_tensors(path)
    assert read_tensors(DATA / FILES[0]).keys() == EXPECTED.keys()


def test_compressed_and_big_endian_archives_are_refused(tmp_path):
    value = {"w": Torch.tensor()}
    with pytest.raises(RearError, match="compressed"):
        read_tensors(write_zip(tmp_path / "a.pt", value, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(RearError, match="big-endian"):
        read_tensors(write_zip(tmp_path / "b.pt", value, byteorder=b"big"))


PARAMS = {
    "stack": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)},
    "conv": {"kernel": np.arange(120, dtype=np.float32).reshape(2, 5, 3, 4)},
    "half": np.array([1.5, -0.25], np.float16),
    "bfloat16": np.array([[3.0, -0.5, 1e30]], ml_dtypes.bfloat16),
    "long": np.array([-5, 1 << 40]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def torch_name(path: layout.Path) -> layout.TorchName:
    """One layer of `stack` is a linear one."""
    if path[0] == "stack":
        return layout.TorchName("layers.{i}.weight", layout.LINEAR)
    return layout.TorchName(path[0], layout.CONV if path[0] == "conv" else None)


@pytest.mark.parametrize("under", ["", "model"])
def test_what_is_written_is_read_again(tmp_path, under):
    torch_writer.save(tmp_path / "a.bin", PARAMS, torch_name, under=under)
    tensors, expected = read_tensors(tmp_path / "a.bin"), dict(layout.torch_tensors(PARAMS, torch_name))
    assert list(tensors) == list(expected)
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype, key
        assert tensors[key].shape == tensor.shape, key
        np.testing.assert_array_equal(tensors[key], tensor, err_msg=key)


def test_what_is_written_is_what_torch_load_takes(tmp_path):
    """The members and opcodes of its format; `weights_only=True` admits these names and no others."""
    torch_writer.save(tmp_path / "a.bin", PARAMS, torch_name, under="model")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        assert archive.testzip() is None
        members = {info.filename: info.compress_type for info in archive.infolist()}
        pickled = archive.read("archive/data.pkl")
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    assert next(iter(members)) == "archive/data.pkl"
    assert {f"archive/data/{i}" for i in range(8)} < members.keys()
    assert set(members.values()) == {zipfile.ZIP_STORED}
    opcodes = list(pickletools.genops(pickled))
    assert max(opcode.proto for opcode, _, _ in opcodes) <= 2
    names = {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    storages = {f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Long")}
    assert names == {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | storages
