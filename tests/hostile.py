"""What the tests of damaged and hostile files share: small files of each format, and a bound on what reading takes."""

import io
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rear_jax.errors import RearError
from rear_jax.weights import layout, shards

VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
MOST = 64 << 20  # bytes that reading a file of some kB may take
LONGEST = 5.0  # seconds of the processor, which a busy machine does not lengthen


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def bounded(read: Callable[[], Any]) -> Any:
    """What a function gives, or its RearError; fails on other errors, on two lines, and beyond LONGEST and MOST."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        found = read()
    except RearError as error:
        found = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert not isinstance(found, RearError) or "\n" not in str(found)
    assert time.process_time() - begun < LONGEST
    assert peak < MOST
    return found


def everything(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file; their outline must say what they are."""
    tensors = shards.open_weights(path)
    shapes = layout.outline(tensors)
    found = {key: np.array(value) for key, value in tensors.items()}
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in shapes.items()}
    return found


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
