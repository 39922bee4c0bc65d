"""PyTorch checkpoint files as numpy arrays, without PyTorch and without running what a pickle asks for.

Three formats are read, told apart by their first bytes: `.safetensors`, the zip archives that `torch.save` writes
since PyTorch 1.6, and the older stream of pickles. The pickles are read as data (`pickles.py`), so that a downloaded
file cannot run code. What a file says of sizes is compared with what it has before anything is made of it.
Format: torch/serialization.py and torch/_utils.py of PyTorch.

Tensors are read from the file one by one, when they are asked for: a file larger than memory can be looked through,
and converting one needs room for the result and one tensor.
"""

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from rear_jax.errors import UNREADABLE, RearError, one_line
from rear_jax.runtime import places
from rear_jax.runtime.files import open_regular
from rear_jax.weights import pickles, sections
from rear_jax.weights.layout import OpenTensors, stand_in
from rear_jax.weights.pickles import Name
from rear_jax.weights.safetensors_file import DTYPES
from rear_jax.weights.views import View

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
_DTYPES = {  # of safetensors
    **{code: np.dtype(name) for name, code in DTYPES.items()},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") + b"."  # as a pickle
_ZIP_START = b"PK\x03\x04"
_BLOCK = 1 << 20  # bytes that are read at once where nothing but a checksum is wanted
_AXES = 32  # of a tensor at most
# What reading a broken or hostile file can raise, beside our own refusals.
_BROKEN = (*UNREADABLE, zipfile.BadZipFile, RuntimeError, safetensors.SafetensorError)


def read_tensors(path: str | Path, section: str = "") -> Mapping[str, np.ndarray]:
    """Opens the tensors of a checkpoint file.

    A file may hold several state dicts, of which `sections.state_dict` tells the one that counts. Entries that are no
    tensors (step counts, settings) are left out.

    Args:
      path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file.
      section: of the file, by name; '' = the one that is usual.

    Returns:
      State-dict key -> array in the dtype of the file (bfloat16 from ml_dtypes), read at each look-up.

    Raises RearError: the file is missing, damaged, not a checkpoint, or holds no state dict or not the section; or its
      pickle names what could run code. So do look-ups of a damaged tensor.
    """
    with open_regular(path, f"There is no checkpoint file {path}; check the path, or download the file first.") as file:
        start = file.read(len(_LEGACY_START))
    path = places.local(path)
    if path.suffix == ".safetensors":
        tensors = _SafeTensors(path)
        return View(tensors, section, sections.under(tensors, section, path)) if section else tensors
    if start.startswith(_ZIP_START):
        return _read_zip(path, section)
    if start == _LEGACY_START:
        return _read_legacy(path, section)
    raise _not_a_checkpoint(path, "it starts like no PyTorch or safetensors file")


def _not_a_checkpoint(path: Path, why: object) -> RearError:
    why = one_line(str(why))[:200]
    return RearError(f"{path} is not a whole checkpoint ({why}); it may be cut short or mislabelled: fetch it again.")


class _SafeTensors(OpenTensors):
    """The tensors of an open safetensors file."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safetensors.safe_open(path, framework="numpy")
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}  # noqa: SIM118 - it is no dict
            self._codes = {key: part.get_dtype() for key, part in slices.items()}
            self._shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            for shape in self._shapes.values():
                _require_shape(shape)
        except _BROKEN as error:
            raise _not_a_checkpoint(path, error) from error

    def __getitem__(self, key: str) -> np.ndarray:
        if (code := self._codes[key]) not in DTYPES.values():
            raise RearError(f"{self._path}: {key} is of type {code}, which cannot be read here: save it as bfloat16.")
        try:
            return self._file.get_tensor(key)
        except _BROKEN as error:
            raise _not_a_checkpoint(self._path, error) from error

    def outline(self) -> dict[str, np.ndarray]:
        return {key: stand_in(shape, _DTYPES.get(self._codes[key], np.uint8)) for key, shape in self._shapes.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


class _StorageRef(NamedTuple):
    """A storage that a pickle names and whose bytes lie elsewhere in the file."""

    dtype: np.dtype
    key: str
    start: int  # first element of the part that counts
    length: int  # elements of that part
    whole: int  # elements of storage `key`


class _TensorRef(NamedTuple):
    """A strided window on a storage; offset, size and stride count elements."""

    storage: _StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Storages:
    """The storages that a pickle refers to as ("storage", type, key, device, elements).

    Attributes:
      known: key -> the first reference to it.
    """

    def __init__(self) -> None:
        self.known: dict[str, _StorageRef] = {}

    def __call__(self, pid: Any) -> _StorageRef:
        """A reference; in the older format it may be to a part, a view."""
        if not (type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage"):
            raise ValueError("a reference of its pickle is to no storage")
        _, kind, key, _, whole, *view = pid
        if not (isinstance(kind, Name) and kind.module == "torch" and kind.name in STORAGE_DTYPES and type(key) is str):
            raise ValueError("a storage of its pickle has no type or key")
        _require_sizes(whole)
        start, length = 0, whole
        if view and view[0] is not None:
            if not (type(view[0]) is tuple and len(view[0]) == 3):
                raise ValueError("a view of its pickle is none")
            _, start, length = view[0]
            _require_sizes(start, length)
            if start + length > whole:
                raise ValueError("a view reaches beyond its storage")
        found = _StorageRef(STORAGE_DTYPES[kind.name], key, start, length, whole)
        first = self.known.setdefault(key, found)
        if (first.dtype, first.whole) != (found.dtype, whole):
            raise ValueError("a storage has two types or sizes")
        return found


def _rebuilt_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _TensorRef:
    """Stands for torch._utils._rebuild_tensor_v2; gradient flags, hooks and metadata are dropped."""
    if not (isinstance(storage, _StorageRef) and type(size) is tuple and type(stride) is tuple):
        raise ValueError("a tensor of its pickle has no storage or shape")
    _require_shape(size)
    _require_sizes(offset, *stride)
    if len(size) != len(stride):
        raise ValueError("a tensor of its pickle has other strides than axes")
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride, strict=True))  # others are never stepped
    if offset + _span(size, stride) > storage.length:
        raise ValueError("a tensor reaches beyond its storage")
    return _TensorRef(storage, offset, size, stride)


def _rebuilt_parameter(tensor: Any, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter."""
    return tensor


def _refuse_call(*_: Any) -> None:
    raise ValueError("its pickle calls the type of a storage")


_FUNCTIONS = {
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuilt_tensor,
    Name("torch._utils", "_rebuild_parameter"): _rebuilt_parameter,
    **{Name("torch", kind): _refuse_call for kind in STORAGE_DTYPES},
}


def _require_sizes(*sizes: Any) -> None:
    """Raises ValueError unless all are integers that a file can count to; True and 3.0 are none."""
    if not all(type(size) is int and 0 <= size < 1 << 48 for size in sizes):
        raise ValueError("a size, offset or stride is no integer of the right range")


def _require_shape(shape: tuple[Any, ...]) -> None:
    """Raises ValueError unless numpy can have an array of this shape."""
    _require_sizes(*shape)
    if len(shape) > _AXES or math.prod(max(n, 1) for n in shape) >= 1 << 56:
        raise ValueError("a tensor has a shape that no array can have")


def _load(file: BinaryIO, size: int, path: Path) -> tuple[Any, dict[str, _StorageRef]]:
    """One pickle with tensors as `_TensorRef`, and its storages."""
    storages = _Storages()
    return pickles.load(file, size, path, _FUNCTIONS, storages), storages.known


def _state_dict(value: Any, section: str, path: Path) -> dict[str, _TensorRef]:
    """The tensors of an unpickled object that count, see `read_tensors`."""
    return sections.state_dict(value, lambda item: isinstance(item, _TensorRef), section, path)


class _Place(NamedTuple):
    """Where a storage lies in a file.

    Attributes:
      start, count: first byte and number of bytes.
      checksum: CRC-32 of them, None where the format has none.
    """

    start: int
    count: int
    checksum: int | None = None


class _TorchTensors(OpenTensors):
    """The tensors of a PyTorch file whose storages lie at known bytes of it."""

    def __init__(self, path: Path, refs: dict[str, _TensorRef], places: Mapping[str, _Place]):
        self._path, self._refs, self._places = path, refs, places
        self._unchecked = {key for key, place in places.items() if place.checksum is not None}
        size = path.stat().st_size
        for ref in refs.values():
            storage, place = ref.storage, places[ref.storage.key]
            if place.count != storage.whole * storage.dtype.itemsize or place.start + place.count > size:
                raise ValueError(f"storage {storage.key} is cut short or of another size than its tensors say")
            if math.prod(ref.size) > size:
                raise ValueError(f"a tensor repeats the {size} bytes of the file over and over")

    def __getitem__(self, key: str) -> np.ndarray:
        ref = self._refs[key]
        storage, count = ref.storage, _span(ref.size, ref.stride)
        width, place = storage.dtype.itemsize, self._places[storage.key]
        self._require_checksum(storage.key)
        start = place.start + (storage.start + ref.offset) * width
        elements = np.fromfile(self._path, storage.dtype, count, offset=start)
        if len(elements) < count:
            raise _not_a_checkpoint(self._path, f"storage {storage.key} is cut short")
        return np.lib.stride_tricks.as_strided(elements, ref.size, [step * width for step in ref.stride])

    def _require_checksum(self, key: str) -> None:
        """Compares the checksum of a storage, once."""
        if key not in self._unchecked:
            return
        found, (start, left, checksum) = 0, self._places[key]
        with self._path.open("rb") as file:
            file.seek(start)
            while left and (block := file.read(min(left, _BLOCK))):
                found, left = zlib.crc32(block, found), left - len(block)
        if found != checksum:
            raise _not_a_checkpoint(self._path, f"the checksum of storage {key} is another")
        self._unchecked.remove(key)

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


def _read_zip(path: Path, section: str) -> _TorchTensors:
    """Opens a zip archive of `<name>/data.pkl` and the storages `<name>/data/<key>`."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            for info in (members["data.pkl"], members.get("byteorder")):
                _require_stored(info)
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ValueError("written on a big-endian machine")
            if (count := members["data.pkl"].file_size) > pickles.LONGEST:
                raise ValueError(f"its pickle has {count} bytes")
            value, _ = _load(io.BytesIO(archive.read(members["data.pkl"])), count, path)
            refs = _state_dict(value, section, path)
            keys = {ref.storage.key for ref in refs.values()}
            places = {key: _place_of(file, members[f"data/{key}"]) for key in keys}
        return _TorchTensors(path, refs, places)
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error


def _require_stored(info: zipfile.ZipInfo | None) -> None:
    if info and (info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size):
        raise ValueError(f"{info.filename} is compressed")


def _place_of(file: BinaryIO, info: zipfile.ZipInfo) -> _Place:
    """Where in the file the bytes of one uncompressed member of a zip archive are."""
    _require_stored(info)
    file.seek(info.header_offset)
    header = file.read(30)
    if not header.startswith(_ZIP_START):
        raise ValueError(f"{info.filename} is not where the archive says")
    name_length, extra_length = struct.unpack("<HH", header[26:])
    return _Place(info.header_offset + 30 + name_length + extra_length, info.file_size, info.CRC)


def _read_legacy(path: Path, section: str) -> _TorchTensors:
    """Opens five pickles (magic, version, machine, object, storage keys) and the storages after them."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            *_, (machine, _), (value, storages), (keys, _) = [_load(file, size, path) for _ in range(5)]
            if not machine["little_endian"]:
                raise ValueError("written on a big-endian machine")
            refs, position, places = _state_dict(value, section, path), file.tell(), {}
            for key in keys:  # the number of elements as int64, then the elements
                if type(key) is not str:
                    raise ValueError("the key of a storage is no text")
                file.seek(position)
                (length,) = struct.unpack("<q", file.read(8))
                _require_sizes(length)
                places[key] = _Place(position + 8, length * storages[key].dtype.itemsize)
                position = sum(places[key][:2])
        return _TorchTensors(path, refs, places)
    except _BROKEN as error:
        raise _not_a_checkpoint(path, error) from error
