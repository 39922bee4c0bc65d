"""Images in .tar shards, with captions or with classes, in the form that webdataset and img2dataset write.

Members with one key belong together: an image beside KEY.txt (its caption), KEY.json (a record with the caption or the
class) or KEY.cls (the number of its class). The first image that has one of them says which one is taken: a caption
from KEY.txt or KEY.json, a class from KEY.cls or KEY.json. Where no captions are wanted, KEY.txt may hold one too.
Shards are read in the order of their names, and images in the order in which their keys begin. The index comes from
headers, captions and classes; no image is read for it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally, warn_of_left_out
from rear_jax.data.sources.classes import by_training, numbered, numbers_as_names
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES
from rear_jax.data.sources.encoded import EncodedImages, EncodedPairs
from rear_jax.data.sources.files import split_files
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.kept_index import Arrays, kept_index
from rear_jax.data.sources.tar_members import COMPRESSED_SUFFIXES, Member, members_by_key, read_member
from rear_jax.data.sources.texts import caption_at, class_at, class_of, json_record, plain_caption
from rear_jax.errors import RearError

SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)  # all but the first are refused by name
BESIDE = ("txt", "json", "cls")


class Beside(NamedTuple):
    """What stands beside each image: the suffix of the member, and whether it holds a caption, else a class."""

    suffix: str
    captioned: bool

    def caption(self, content: bytes, settings: SourceSettings) -> str:
        """The caption in a member; raises ValueError where there is none."""
        if self.suffix == "txt":
            return plain_caption(content)
        return caption_at(json_record(content), settings.caption_key)

    def label(self, content: bytes, settings: SourceSettings) -> int | str:
        """The class in a member; raises ValueError where there is none."""
        if self.suffix == "json":
            return class_at(json_record(content), settings.label_key)
        label = class_of(plain_caption(content))
        if self.suffix == "cls" and isinstance(label, str):
            raise ValueError("its class is no number")
        return label


class Shards(NamedTuple):
    """Where images lie, and their captions or classes.

    Attributes:
      files: the shards.
      table: int64 [n, 5]: number of the shard, start and size of the image in bytes, then those of the caption, or the
        class by its own number and 0.
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

    def __init__(self, name: str, shards: Shards, beside: Beside, settings: SourceSettings, broken: Broken):
        super().__init__(name, len(shards.table), broken)
        self._shards, self._beside, self._settings = shards, beside, settings
        self.contents = contents.of_files(shards.files, beside.suffix, settings.caption_key)

    def _where(self, index: int) -> str:
        return self._shards.where(index)

    def _image(self, index: int) -> bytes:
        return self._shards.image(index)

    def _caption(self, index: int) -> str:
        return self._beside.caption(self._shards.text(index), self._settings)


class TarClasses(EncodedImages):
    """Images with classes."""

    def __init__(
        self,
        name: str,
        shards: Shards,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        of: tuple[str, ...],
        broken: Broken,
    ):
        """`labels`: int64 [n]; `of`: where the classes come from."""
        super().__init__(name, len(class_names) or int(labels.max()) + 1, class_names, broken)
        self._shards, self._labels = shards, labels
        self.contents = contents.of_files(shards.files, *of, *class_names)

    def __len__(self) -> int:
        return len(self._shards.table)

    def _where(self, index: int) -> str:
        return self._shards.where(index)

    def _read(self, index: int) -> tuple[bytes, int]:
        return self._shards.image(index), int(self._labels[index])


def open_webdataset(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    files = split_files(path, split, SUFFIXES)
    name = files[0].parent.name
    broken = Broken(name, settings.max_broken_share)
    index = _kept(files, settings, broken)
    warn_of_left_out(name, Tally.of_arrays(index, "left_out"))
    broken.skip(Tally.of_arrays(index, "broken"), good=len(index["table"]))
    if not len(index["table"]):
        raise RearError(f"{path} holds no images with one of .txt .json .cls beside them")
    shards, beside = Shards(files, index["table"]), Beside(str(index["suffix"]), bool(index["captioned"]))
    if beside.captioned:
        return TarPairs(name, shards, beside, settings, broken)
    own = numbers_as_names(index["class_names"].tolist(), shards.table[:, 3], settings.class_names)
    labels, names = by_training(*own, settings.class_names, path)
    of = (beside.suffix, *([settings.label_key] if beside.suffix == "json" else []))
    return TarClasses(name, shards, labels, names, of, broken)


def class_names(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the classes of a split by number, () where they are numbers; raises RearError as `open_webdataset`."""
    files = split_files(path, split, SUFFIXES)
    return tuple(
        _kept(files, settings, Broken(files[0].parent.name, settings.max_broken_share))["class_names"].tolist()
    )


def _kept(files: Sequence[Path], settings: SourceSettings, share: Broken) -> Arrays:
    question = f"webdataset {settings.caption_key} {settings.label_key}"
    return kept_index(files, question, lambda: _index(files, settings, share))


def _index(files: Sequence[Path], settings: SourceSettings, share: Broken) -> Arrays:
    """What is kept of shards; raises RearError where nothing of the first ones is of use."""
    beside, tables, labels = None, [np.zeros((0, 5), np.int64)], []
    broken, left_out = Tally(), Tally()
    for number, shard in enumerate(files):
        rows = []
        for key, members in members_by_key(shard, left_out).items():
            image = _image_of(members)
            beside = beside or _beside(shard, members, settings)
            if image is None and not {*BESIDE} & members.keys():
                left_out.add(f"{shard}, {key.lstrip('/')}")
                continue
            try:
                if image is None or beside is None or beside.suffix not in members:
                    raise ValueError(_lack(members, image, beside))
                place = members[beside.suffix]
                content = read_member(shard, place)
                if beside.captioned:
                    beside.caption(content, settings)
                else:
                    labels.append(beside.label(content, settings))
                    place = (0, 0)
                rows.append((number, *image, *place))
            except ValueError as error:
                broken.add(f"{shard}, {key.lstrip('/')}: {error}")
        tables.append(np.array(rows, np.int64).reshape(-1, 5))
        if not any(map(len, tables)):
            share.skip(broken, good=0)
    table, (names, numbers) = np.concatenate(tables), numbered(labels)
    if len(numbers):
        table[:, 3] = numbers
    suffix, captioned = beside or ("", False)
    facts = {"suffix": np.array(suffix), "captioned": np.array(captioned), "class_names": np.array(names, np.str_)}
    return {**facts, "table": table, **broken.arrays("broken"), **left_out.arrays("left_out")}


def _image_of(members: Mapping[str, Member]) -> Member | None:
    """The image of a key."""
    return next((members[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in members), None)


def _beside(shard: Path, members: Mapping[str, Member], settings: SourceSettings) -> Beside | None:
    """What is taken, by what is beside a first image; None where nothing is."""
    if _image_of(members) is None:
        return None
    wanted = [Beside("txt", True), Beside("json", True)] if settings.caption_key else []
    wanted += [Beside("cls", False), Beside("json", False), Beside("txt", False)]
    there = [one for one in wanted if one.suffix in members]

    def readable(one: Beside) -> bool:
        content = read_member(shard, members[one.suffix])
        try:
            return bool(one.caption(content, settings)) if one.captioned else one.label(content, settings) is not None
        except ValueError:
            return False

    return next((one for one in there if one.suffix != "json" or readable(one)), there[0] if there else None)


def _lack(members: Mapping[str, Member], image: Member | None, beside: Beside | None) -> str:
    """Says what a key has not."""
    there = ", ".join(f".{suffix}" for suffix in members)
    return f"no image, only {there}" if image is None else f"no .{beside.suffix if beside else 'txt'}, only {there}"
