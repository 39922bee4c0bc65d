"""Members of plain .tar files by key, from the headers alone.

A key is the path of a member up to the first dot of its file name; what follows is its suffix, as in webdataset.
"""

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rear_jax.data.sources.broken import Tally
from rear_jax.data.sources.decoding import is_hidden
from rear_jax.errors import UNREADABLE, RearError, one_line

log = logging.getLogger(__name__)

COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # of files that are refused
COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class Member(NamedTuple):
    """Where the content of a member lies in its shard, in bytes."""

    start: int
    size: int


def members_by_key(shard: Path, left_out: Tally) -> dict[str, dict[str, Member]]:
    """The members of each key by suffix in lower case, without the dot; of two of the same name the last.

    Raises RearError: the shard is compressed, cut off, or damaged.
    """
    keys: dict[str, dict[str, Member]] = {}
    for info in headers(shard):
        folder, _, name = info.name.rpartition("/")
        if info.isdir() or any(is_hidden(part) for part in info.name.split("/") if part not in (".", "..")):
            continue
        stem, _, suffix = name.partition(".")
        if info.isreg() and not info.issparse():
            members = keys.setdefault(f"{folder}/{stem}", {})
            if suffix.lower() in members:
                left_out.add(f"{shard}: {info.name}, of which there is a later one")
            members[suffix.lower()] = Member(info.offset_data, info.size)
        else:
            left_out.add(f"{shard}: {info.name}")
    return keys


def read_member(shard: Path, member: Member) -> bytes:
    """The content of a member; raises RearError where the shard is no longer long enough."""
    try:
        with shard.open("rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
    except OSError as error:
        raise RearError(f"{shard} can no longer be read ({error}); restore it") from None
    if len(content) != member.size:
        raise RearError(f"{shard} has become shorter since it was indexed; restore it and start the run again")
    return content


def headers(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of all members, folders and links among them; raises RearError as `members_by_key`."""
    try:
        _refuse_compressed(shard)
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            end = 0
            while (info := tar.next()) is not None:
                if info.size < 0 or tar.offset <= end:  # else the same headers would come again, without end
                    raise tarfile.ReadError(f"{info.name} has a size of {info.size}")
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"{info.name} is cut off")
                end = tar.offset
                yield info
                tar.members.clear()  # it would hold them all
            _require_end(tar, shard)
    except (*UNREADABLE, tarfile.TarError, RecursionError) as error:
        reason = one_line(str(error))
        raise RearError(f"{shard} is damaged or cut off ({reason}); copy it again or remove it") from None


def _require_end(tar: tarfile.TarFile, shard: Path) -> None:
    """At the end is a block of zeros, or nothing; `tarfile` stops at a damaged header as if that were the end."""
    with shard.open("rb") as file:
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        raise tarfile.ReadError(f"no header at byte {tar.offset}")
    if not block:
        log.warning("%s has no mark at its end; its last members may have been cut off", shard)


def _refuse_compressed(shard: Path) -> None:
    with shard.open("rb") as file:
        start = file.read(max(map(len, COMPRESSED)))
    for magic, command in COMPRESSED.items():
        if start.startswith(magic):
            raise RearError(f"{shard} is compressed, so no image in it can be read alone; unpack it by `{command}`")
