"""Members of .zip files: where they lie, from the directory alone, and one at a time.

Format: APPNOTE.TXT of PKWARE. `zipfile` would keep a record of each member in memory, and read all of them at each
start.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rear_jax.data.sources.decoding import MOST_PIXELS
from rear_jax.errors import UNREADABLE, RearError, one_line

ENCRYPTED = 1  # a flag of a member
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field; then come the bytes
SIGNATURE = b"PK\3\4"
LARGEST = 4 * MOST_PIXELS  # bytes of a member unpacked: the largest picture that is read, in a format without packing
_BROKEN = (*UNREADABLE, zipfile.BadZipFile, NotImplementedError, RuntimeError)  # zipfile's


class Packed(NamedTuple):
    """Where a member lies: its header, its bytes packed and unpacked, how it is packed, and the sum of its bytes."""

    start: int
    packed: int
    size: int
    method: int
    crc: int


def zip_directory(path: Path) -> Iterator[tuple[str, Packed | str]]:
    """Names of the members that are no folders, and where each lies, or why it cannot be read.

    Raises RearError: it is no whole .zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except _BROKEN as error:
        reason = one_line(str(error)) or type(error).__name__
        raise RearError(f"{path} is no whole .zip file ({reason}); copy it again or remove it") from None
    size = path.stat().st_size
    for info in infos:
        if not info.is_dir():
            packed = Packed(info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
            yield info.filename, _unfit(info, size) or packed


def _unfit(info: zipfile.ZipInfo, archive_size: int) -> str:
    """Why a member cannot be read, '' where it can."""
    if info.flag_bits & ENCRYPTED:
        return "it is encrypted; unpack it and pack it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"it is packed by method {info.compress_type}; pack it by `zip`"
    if info.file_size > LARGEST:
        return f"it unpacks to {info.file_size} bytes; {LARGEST} are the most"
    if not 0 <= info.header_offset <= archive_size - info.compress_size:
        return "it lies outside the archive"
    return ""


def read_packed(path: Path, place: Packed) -> bytes:
    """What a member holds; never more than its directory says is unpacked.

    Raises RearError: its bytes are not as the directory says.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            signature, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
            if signature != SIGNATURE:
                raise ValueError("it has no header")
            file.seek(name + extra, 1)
            content = file.read(place.packed)
        if place.method == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, place.size + 1)
        if len(content) != place.size or zlib.crc32(content) != place.crc:
            raise ValueError("its bytes are not those that were packed")
    except UNREADABLE as error:
        raise RearError(
            f"{path}: the member at byte {place.start} is damaged ({one_line(str(error))}); copy it again"
        ) from None
    return content
