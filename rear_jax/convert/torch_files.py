"""PyTorch checkpoint files as numpy arrays, without PyTorch and without running what a pickle asks for.

Three formats are read, told apart by their first bytes: `.safetensors`, the zip archives that `torch.save` writes
since PyTorch 1.6, and the older stream of pickles. The pickles go through an unpickler that knows tensors, their
storages and plain containers and refuses every other class by name, so that a downloaded file cannot run code.
Format: torch/serialization.py and torch/_utils.py of PyTorch.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from rear_jax.errors import RearError

SECTIONS = ("model", "module", "state_dict", "ema")
STORAGE_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_ZIP_START = b"PK\x03\x04"
# What reading a broken or hostile file can raise, beside our own refusals.
_BROKEN = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    MemoryError,
    OverflowError,
)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint file.

    A file whose top level is not itself a state dict but holds exactly one of the dicts "model", "module",
    "state_dict" and "ema" is read from there. Entries that are not tensors (step counts, settings) are left out.

    Args:
      path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file.

    Returns:
      State-dict key -> array in the dtype of the file (bfloat16 from ml_dtypes). Arrays of a PyTorch file are read-only
      views of the memory-mapped file, with the file's strides; tensors that share a storage share memory.

    Raises:
      RearError: the file is missing, truncated, not a checkpoint, or holds no state dict or several; or its pickle
        names a class outside the list above.
    """
    path = Path(path)
    if not path.is_file():
        raise RearError(f"There is no checkpoint file {path}; check the path, or download the file first.")
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if start.startswith(_ZIP_START):
        return _read_zip(path)
    if start == _LEGACY_START:
        return _read_legacy(path)
    raise _not_a_checkpoint(path, "it starts like no PyTorch or safetensors file")


def _not_a_checkpoint(path: Path, why: object) -> RearError:
    return RearError(f"{path} is not a whole checkpoint ({why}); it may be cut short or mislabelled: fetch it again.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise _not_a_checkpoint(path, error) from error


class _StorageType(NamedTuple):
    """Stands for a class such as torch.FloatStorage."""

    dtype: np.dtype


class _StorageRef(NamedTuple):
    """A storage that a pickle names and whose bytes lie elsewhere in the file."""

    dtype: np.dtype
    key: str
    start: int  # first element, counted from the start of storage `key`
    length: int  # elements


class _TensorRef(NamedTuple):
    """A strided window on a storage; offset, size and stride count elements."""

    storage: _StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds containers with `_TensorRef` leaves, and refuses every class that a state dict does not need.

    Attributes:
      widths: bytes per element of every storage named so far.
    """

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self.widths: dict[str, int] = {}
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return _StorageType(STORAGE_DTYPES[name])
        admitted = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
        }
        if (module, name) not in admitted:
            raise RearError(
                f"{self._path} asks for {module}.{name}, which is refused because a checkpoint could run code through "
                "it; save the bare state dict (nothing but tensors) from PyTorch and give that file."
            )
        return admitted[module, name]

    def persistent_load(self, pid: Any) -> _StorageRef:
        tag, storage_type, key, _, length, *view = pid
        if tag != "storage":
            raise ValueError(f"unknown reference {tag!r}")
        self.widths[key] = storage_type.dtype.itemsize
        start = 0
        if view and view[0] is not None:  # the older format can name a part of a storage
            _, start, length = view[0]
        return _StorageRef(storage_type.dtype, key, start, length)

    def _rebuild_tensor(
        self, storage: _StorageRef, offset: int, size: tuple, stride: tuple, requires_grad: bool, hooks: Any, *_: Any
    ) -> _TensorRef:
        """Stands for torch._utils._rebuild_tensor_v2; gradient flags, hooks and metadata are dropped."""
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min((offset, *size, *stride)) < 0 or (math.prod(size) > 0 and last >= storage.length):
            raise ValueError(f"a tensor reaches beyond its storage {storage.key}")
        return _TensorRef(storage, offset, tuple(size), tuple(stride))

    def _rebuild_parameter(self, tensor: _TensorRef, requires_grad: bool, hooks: Any) -> _TensorRef:
        return tensor


def _state_dict(value: Any, path: Path) -> dict[str, _TensorRef]:
    """The tensors of an unpickled object, from its top level or from the one section that has any."""
    tensors = _tensors_in(value)
    if not tensors and isinstance(value, dict):
        sections = {name: found for name in SECTIONS if (found := _tensors_in(value.get(name)))}
        if len(sections) > 1:
            raise RearError(f"{path} holds several state dicts ({', '.join(sections)}); save the wanted one alone.")
        tensors = next(iter(sections.values()), {})
    if not tensors:
        raise RearError(f"{path} holds no state dict, at its top level or under {', '.join(SECTIONS)}; save one.")
    return tensors


def _tensors_in(value: Any) -> dict[str, _TensorRef]:
    items = value.items() if isinstance(value, dict) else ()
    return {key: item for key, item in items if isinstance(key, str) and isinstance(item, _TensorRef)}


def _view(tensor: _TensorRef, stored: np.ndarray) -> np.ndarray:
    """The array a `_TensorRef` stands for, given the bytes [n] uint8 of its storage."""
    storage = tensor.storage
    width = storage.dtype.itemsize
    part = stored[storage.start * width : (storage.start + storage.length) * width]
    if part.size != storage.length * width:
        raise ValueError(f"storage {storage.key} is cut short")
    if math.prod(tensor.size) == 0:
        return np.empty(tensor.size, storage.dtype)
    elements = part.view(storage.dtype)[tensor.offset :]
    strides = [step * width for step in tensor.stride]
    return np.lib.stride_tricks.as_strided(elements, tensor.size, strides, writeable=False)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, memory-mapped: [n] uint8."""
    return np.memmap(path, np.uint8, mode="r").view(np.ndarray)


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    """Reads a zip archive of `<name>/data.pkl` and the storages `<name>/data/<key>`."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ValueError("written on a big-endian machine")
            value = _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), path).load()
        mapped = _map(path)
        refs = _state_dict(value, path)
        return {key: _view(ref, _zip_member(mapped, members[f"data/{ref.storage.key}"])) for key, ref in refs.items()}
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error


def _zip_member(mapped: np.ndarray, info: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of one uncompressed member of a mapped zip archive."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    header = mapped[info.header_offset : info.header_offset + 30]
    name_length, extra_length = struct.unpack("<HH", header[26:].tobytes())
    start = info.header_offset + 30 + name_length + extra_length
    return mapped[start : start + info.file_size]


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """Reads five pickles (magic, version, machine, object, storage keys) and the storages after them."""
    try:
        with path.open("rb") as file:
            unpicklers = [_Unpickler(file, path) for _ in range(5)]
            _, _, machine, value, keys = (unpickler.load() for unpickler in unpicklers)
            position = file.tell()
        if not machine["little_endian"]:
            raise ValueError("written on a big-endian machine")
        mapped, storages = _map(path), {}
        for key in keys:  # the number of elements as int64, then the elements
            (length,) = struct.unpack("<q", mapped[position : position + 8].tobytes())
            end = position + 8 + length * unpicklers[3].widths[key]
            storages[key] = mapped[position + 8 : end]
            position = end
        return {key: _view(ref, storages[ref.storage.key]) for key, ref in _state_dict(value, path).items()}
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error
