"""PyTorch checkpoint files as numpy arrays, without PyTorch and without running what a pickle asks for.

Three formats are read, told apart by their first bytes: `.safetensors`, the zip archives that `torch.save` writes
since PyTorch 1.6, and the older stream of pickles. The pickles go through an unpickler that knows tensors, their
storages and plain containers and refuses every other class by name, so that a downloaded file cannot run code.
Format: torch/serialization.py and torch/_utils.py of PyTorch.

Tensors are read from the file one by one, when they are asked for: a file larger than memory can be looked through,
and converting one needs room for the result and one tensor.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from rear_jax.errors import RearError
from rear_jax.weights.layout import OpenTensors, stand_in
from rear_jax.weights.safetensors_file import DTYPES

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
_DTYPES = {code: np.dtype(name) for name, code in DTYPES.items()}  # of safetensors
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


def read_tensors(path: str | Path) -> Mapping[str, np.ndarray]:
    """Opens the tensors of a checkpoint file.

    A file whose top level is not itself a state dict but holds exactly one of the dicts "model", "module",
    "state_dict" and "ema" is read from there. Entries that are not tensors (step counts, settings) are left out.

    Args:
      path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file.

    Returns:
      State-dict key -> array in the dtype of the file (bfloat16 from ml_dtypes), read at each look-up.

    Raises RearError: the file is missing, truncated, not a checkpoint, or holds no state dict or several; or its pickle
      names a class outside the list above.
    """
    path = Path(path)
    if not path.is_file():
        raise RearError(f"There is no checkpoint file {path}; check the path, or download the file first.")
    with path.open("rb") as file:
        start = file.read(len(_LEGACY_START))
    if path.suffix == ".safetensors":
        return _SafeTensors(path)
    if start.startswith(_ZIP_START):
        return _read_zip(path)
    if start == _LEGACY_START:
        return _read_legacy(path)
    raise _not_a_checkpoint(path, "it starts like no PyTorch or safetensors file")


def _not_a_checkpoint(path: Path, why: object) -> RearError:
    return RearError(f"{path} is not a whole checkpoint ({why}); it may be cut short or mislabelled: fetch it again.")


class _SafeTensors(OpenTensors):
    """The tensors of an open safetensors file."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
        except safetensors.SafetensorError as error:
            raise _not_a_checkpoint(path, error) from error
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        if (code := self._file.get_slice(key).get_dtype()) not in _DTYPES:
            raise RearError(f"{self._path}: {key} is of type {code}, which cannot be read here: save it as bfloat16.")
        return self._file.get_tensor(key)

    def outline(self) -> dict[str, np.ndarray]:
        slices = {key: self._file.get_slice(key) for key in self._keys}
        return {key: stand_in(tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), np.uint8)) for key, s in slices.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


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
        if min((offset, *size, *stride)) < 0 or offset + _span(size, stride) > storage.length:
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


class _TorchTensors(OpenTensors):
    """The tensors of a PyTorch file whose storages begin at known bytes of it."""

    def __init__(self, path: Path, refs: dict[str, _TensorRef], starts: Mapping[str, int]):
        self._path, self._refs, self._starts = path, refs, starts
        size = path.stat().st_size
        for ref in refs.values():
            storage = ref.storage
            if starts[storage.key] + (storage.start + storage.length) * storage.dtype.itemsize > size:
                raise ValueError(f"storage {storage.key} is cut short")

    def __getitem__(self, key: str) -> np.ndarray:
        ref = self._refs[key]
        storage, count = ref.storage, _span(ref.size, ref.stride)
        width = storage.dtype.itemsize
        start = self._starts[storage.key] + (storage.start + ref.offset) * width
        elements = np.fromfile(self._path, storage.dtype, count, offset=start)
        return np.lib.stride_tricks.as_strided(elements, ref.size, [step * width for step in ref.stride])

    def outline(self) -> dict[str, np.ndarray]:
        return {key: stand_in(ref.size, ref.storage.dtype) for key, ref in self._refs.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def _span(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of a storage from the first to the last that a strided tensor touches."""
    if math.prod(size) == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _read_zip(path: Path) -> _TorchTensors:
    """Opens a zip archive of `<name>/data.pkl` and the storages `<name>/data/<key>`."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ValueError("written on a big-endian machine")
            value = _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), path).load()
            refs = _state_dict(value, path)
            storages = {ref.storage.key: ref.storage for ref in refs.values()}
            starts = {key: _member_start(file, members[f"data/{key}"], storages[key]) for key in storages}
        return _TorchTensors(path, refs, starts)
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error


def _member_start(file: BinaryIO, info: zipfile.ZipInfo, storage: _StorageRef) -> int:
    """Where in the file the bytes of one uncompressed member of a zip archive begin."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    if info.file_size < (storage.start + storage.length) * storage.dtype.itemsize:
        raise ValueError(f"storage {storage.key} is cut short")
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<HH", file.read(30)[26:])
    return info.header_offset + 30 + name_length + extra_length


def _read_legacy(path: Path) -> _TorchTensors:
    """Opens five pickles (magic, version, machine, object, storage keys) and the storages after them."""
    try:
        with path.open("rb") as file:
            unpicklers = [_Unpickler(file, path) for _ in range(5)]
            _, _, machine, value, keys = (unpickler.load() for unpickler in unpicklers)
            if not machine["little_endian"]:
                raise ValueError("written on a big-endian machine")
            position, starts = file.tell(), {}
            for key in keys:  # the number of elements as int64, then the elements
                file.seek(position)
                (length,) = struct.unpack("<q", file.read(8))
                starts[key] = position + 8
                position += 8 + length * unpicklers[3].widths[key]
        return _TorchTensors(path, _state_dict(value, path), starts)
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error
