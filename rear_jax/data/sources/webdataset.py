"""Images in .tar shards, with captions or with classes, in the form that webdataset and img2dataset write.

Members with one key belong together: an image beside KEY.txt (its caption), KEY.json (a record with the caption) or
KEY.cls (the number of its class). The first image that has one of them says which one is taken, in this order; a
KEY.json without the caption's key makes way for KEY.cls. Shards are read in the order of their names, and images in the
order in which their keys begin. The index comes from headers and captions; no image is read for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES
from rear_jax.data.sources.encoded import EncodedImages, EncodedPairs
from rear_jax.data.sources.files import split_files
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.kept_index import Arrays, kept_index
from rear_jax.data.sources.tar_members import Member, members_by_key, read_member
from rear_jax.data.sources.texts import caption_at, json_record, plain_caption
from rear_jax.errors import RearError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # all but the first are refused by name
CAPTIONS = ("txt", "json")
CLASS = "cls"


class Shards(NamedTuple):
    """Where images lie, and their captions or classes.

    Attributes:
      files: the shards.
      table: int64 [n, 5]: number of the shard, start and size of the image in bytes, then those of the caption, or the
        class and 0.
    """

    files: Sequence[Path]
    table: np.ndarray

    def where(self, index: int) -> str:
        """Names an image."""
        return f"{self.files[self.table[index, 0]]}, image at byte {self.table[index, 1]}"

    def image(self, index: int) -> bytes:
        """An encoded image."""
        shard, *place = self.table[index, :3].tolist()
        return read_member(self.files[shard], Member(*place))

    def text(self, index: int) -> bytes:
        """What the member beside an image holds."""
        shard, _, _, *place = self.table[index].tolist()
        return read_member(self.files[shard], Member(*place))


class TarPairs(EncodedPairs):
    """Images with captions."""

    def __init__(self, name: str, shards: Shards, kind: str, caption_key: str, broken: Broken):
        super().__init__(name, len(shards.table), broken)
        self._shards, self._kind, self._caption_key = shards, kind, caption_key
        self.contents = contents.of_files(shards.files, kind, caption_key)

    def _where(self, index: int) -> str:
        return self._shards.where(index)

    def _image(self, index: int) -> bytes:
        return self._shards.image(index)

    def _caption(self, index: int) -> str:
        return _caption(self._shards.text(index), self._kind, self._caption_key)


class TarClasses(EncodedImages):
    """Images with numbers of classes."""

    def __init__(self, name: str, shards: Shards, broken: Broken):
        super().__init__(name, int(shards.table[:, 3].max()) + 1, (), broken)
        self._shards, self.contents = shards, contents.of_files(shards.files, CLASS)

    def __len__(self) -> int:
        return len(self._shards.table)

    def _where(self, index: int) -> str:
        return self._shards.where(index)

    def _read(self, index: int) -> tuple[bytes, int]:
        return self._shards.image(index), int(self._shards.table[index, 3])


def open_webdataset(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    files = split_files(path, split, SUFFIXES)
    name = files[0].parent.name
    broken = Broken(name, settings.max_broken_share)
    question = f"webdataset {settings.caption_key}"
    index = kept_index(files, question, lambda: _index(files, settings.caption_key, broken))
    warn_of_left_out(name, Tally.of_arrays(index, "left_out"))
    broken.skip(Tally.of_arrays(index, "broken"), good=len(index["table"]))
    if not len(index["table"]):
        raise RearError(f"{path} holds no images with one of .txt .json .cls beside them")
    shards, kind = Shards(files, index["table"]), str(index["kind"])
    if kind == CLASS:
        return TarClasses(name, shards, broken)
    return TarPairs(name, shards, kind, settings.caption_key, broken)


def _index(files: Sequence[Path], caption_key: str, share: Broken) -> Arrays:
    """What is kept of shards; raises RearError where nothing of the first ones is of use."""
    kind, tables = "", [np.zeros((0, 5), np.int64)]
    broken, left_out = Tally(), Tally()
    for number, shard in enumerate(files):
        rows = []
        for key, members in members_by_key(shard, left_out).items():
            image = _image_of(members)
            kind = kind or _kind(shard, members, caption_key)
            if image is None and not {*CAPTIONS, CLASS} & members.keys():
                left_out.add(f"{shard}, {key.lstrip('/')}")
                continue
            try:
                if image is None or kind not in members:
                    raise ValueError(_lack(members, image, kind))
                rows.append((number, *image, *_text_of(shard, members[kind], kind, caption_key)))
            except ValueError as error:
                broken.add(f"{shard}, {key.lstrip('/')}: {error}")
        tables.append(np.array(rows, np.int64).reshape(-1, 5))
        if not any(map(len, tables)):
            share.skip(broken, good=0)
    tallies = broken.arrays("broken") | left_out.arrays("left_out")
    return {"kind": np.array(kind), "table": np.concatenate(tables), **tallies}


def _image_of(members: Mapping[str, Member]) -> Member | None:
    """The image of a key."""
    return next((members[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in members), None)


def _kind(shard: Path, members: Mapping[str, Member], caption_key: str) -> str:
    """The suffix that holds captions or classes, by what is beside a first image; '' where nothing is."""
    if _image_of(members) is None:
        return ""
    kind = next((kind for kind in (*CAPTIONS, CLASS) if kind in members), "")
    if kind == "json" and CLASS in members:
        try:
            _caption(read_member(shard, members[kind]), kind, caption_key)
        except ValueError:
            return CLASS
    return kind


def _lack(members: Mapping[str, Member], image: Member | None, kind: str) -> str:
    """Says what a key has not."""
    there = ", ".join(f".{suffix}" for suffix in members)
    return f"no image, only {there}" if image is None else f"no .{kind or 'txt'}, only {there}"


def _text_of(shard: Path, member: Member, kind: str, caption_key: str) -> tuple[int, int]:
    """The last two columns of the table; raises ValueError where a caption or class is of no use."""
    content = read_member(shard, member)
    if kind != CLASS:
        _caption(content, kind, caption_key)
        return member
    try:
        label = int(content)
    except ValueError:
        raise ValueError("its class is no number") from None
    if not 0 <= label < 2**31:
        raise ValueError(f"its class is {label}")
    return label, 0


def _caption(content: bytes, kind: str, caption_key: str) -> str:
    """The caption in a member; raises ValueError where there is none."""
    return plain_caption(content) if kind == "txt" else caption_at(json_record(content), caption_key)
