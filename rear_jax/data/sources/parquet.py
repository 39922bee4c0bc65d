"""Images in .parquet files, with captions or with classes, in the form of data sets on the Hugging Face hub.

The column `image` holds encoded images, as bytes or as a record with `bytes`. The column `config.data.caption_key`
holds the captions; where there is none, the column `label` holds numbers of classes. Files are read in the order of
their names. The index comes from the captions or labels; no image is read for it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally
from rear_jax.data.sources.classes import renumbered
from rear_jax.data.sources.encoded import EncodedImages, EncodedPairs
from rear_jax.data.sources.files import split_files
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.kept_index import Arrays, kept_index
from rear_jax.data.sources.row_groups import RowGroups, read_column
from rear_jax.data.sources.texts import plain_caption
from rear_jax.errors import RearError, one_line

log = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
LARGE_GROUP = 32 * 2**20  # bytes of images in a row group, above which shuffled reading is slow


class Rows(NamedTuple):
    """The good rows of some files.

    Attributes:
      groups: reads them.
      image: the column of encoded images.
      bad: rows that are left out, ascending int64.
      length: how many good rows there are.
    """

    groups: RowGroups
    image: str
    bad: np.ndarray
    length: int

    def row(self, index: int) -> int:
        """The number of good row `index` among all rows."""
        good_before = self.bad - np.arange(len(self.bad))  # of each bad row
        return index + int(np.searchsorted(good_before, index, side="right"))

    def where(self, index: int) -> str:
        """Names an image."""
        path, row = self.groups.place(self.row(index))
        return f"{path}, row {row}"

    def encoded(self, index: int) -> bytes:
        """An encoded image; raises RearError where the row has none."""
        content = self.groups.cell(self.row(index), self.image)
        if content is None:
            raise RearError(f"{self.where(index)} has no bytes in the column {self.image}; remove it")
        return content


class ParquetPairs(EncodedPairs):
    """Images with captions."""

    def __init__(self, name: str, rows: Rows, caption_key: str, broken: Broken):
        super().__init__(name, rows.length, broken)
        self._rows, self._caption_key = rows, caption_key
        self.contents = contents.of_files(rows.groups.files, caption_key)

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _image(self, index: int) -> bytes:
        return self._rows.encoded(index)

    def _caption(self, index: int) -> str:
        return plain_caption(self._rows.groups.cell(self._rows.row(index), self._caption_key) or b"")


class ParquetClasses(EncodedImages):
    """Images with numbers of classes."""

    def __init__(self, name: str, rows: Rows, labels: np.ndarray, class_names: tuple[str, ...], broken: Broken):
        super().__init__(name, len(class_names) or int(labels.max()) + 1, class_names, broken)
        self._rows, self._labels = rows, labels
        self.contents = contents.of_files(rows.groups.files, class_names)

    def __len__(self) -> int:
        return len(self._labels)

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _read(self, index: int) -> tuple[bytes, int]:
        return self._rows.encoded(index), int(self._labels[index])


def open_parquet(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    files = split_files(path, split, (".parquet",))
    name, key = files[0].parent.name, settings.caption_key
    broken = Broken(name, settings.max_broken_share)
    index = kept_index(files, f"parquet {key}", lambda: _index(files, key))
    length = int(index["group_rows"].sum()) - len(index["bad"])
    broken.skip(Tally.of_arrays(index, "broken"), good=length)
    if not length:
        raise RearError(f"{path} holds no rows of the split {split!r}; name other files")
    if (size := int(np.median(index["group_bytes"]))) > LARGE_GROUP:
        log.warning(
            "%s: shuffled reading loads a row group of %d MB for each image; write the files again with "
            "row_group_size=100, or as webdataset",
            *(name, size // 2**20),
        )
    groups = RowGroups(files, index["group_file"], index["group_rows"])
    rows = Rows(groups, str(index["image"]), index["bad"], length)
    if bool(index["captioned"]):
        return ParquetPairs(name, rows, key, broken)
    labels, names = _by_training_names(index, settings.class_names, path)
    return ParquetClasses(name, rows, labels, names, broken)


def class_names(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the classes of a split by number, () where its files have none; raises RearError as `open_parquet`."""
    del settings
    return _class_names(_schema(split_files(path, split, (".parquet",))[0])[1].metadata or {})


def _by_training_names(index: Arrays, training: tuple[str, ...], path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels [n] by the numbers and names of the training split; those of the files where one of them has no names."""
    own, labels = tuple(index["class_names"].tolist()), index["labels"]
    if not training or training == own or not own or labels.max(initial=0) >= len(own):
        return labels, own
    present = np.unique(labels)
    numbers = np.zeros(len(own), np.int64)
    numbers[present] = renumbered([own[label] for label in present.tolist()], training, path)
    return numbers[labels], training


class _Form(NamedTuple):
    """What the columns of a file are."""

    image: str
    captioned: bool
    class_names: tuple[str, ...]


def _index(files: Sequence[Path], caption_key: str) -> Arrays:
    """What is kept of the files; raises RearError where their columns are not as they should be."""
    group_file, group_rows, group_bytes, bad, labels = [], [], [], [], []
    broken, form = Tally(), None
    for number, path in enumerate(files):
        metadata, found = _opened(path, caption_key)
        form = form or found
        if found != form:
            raise RearError(f"{path} has other columns or classes than {files[0]}; leave it out")
        before, in_file = sum(group_rows), 0  # rows
        for group in range(metadata.num_row_groups):
            facts = metadata.row_group(group)
            cells = read_column(path, caption_key if form.captioned else LABEL, group).to_pylist()
            if len(cells) != facts.num_rows:
                raise RearError(f"{path}: row group {group} has {len(cells)} of {facts.num_rows} rows; copy it again")
            values, reasons = ([], _captionless(cells)) if form.captioned else _labels(cells)
            labels += values
            for row, reason in reasons.items():
                bad.append(before + in_file + row)
                broken.add(f"{path}, row {in_file + row}: {reason}")
            group_file.append(number)
            group_rows.append(facts.num_rows)
            group_bytes.append(_bytes_of(facts, form.image))
            in_file += facts.num_rows
    numbers = {"group_file": group_file, "group_rows": group_rows, "group_bytes": group_bytes, "bad": bad}
    return {
        **{name: np.array(values, np.int64) for name, values in (numbers | {"labels": labels}).items()},
        **{"image": np.array(form.image), "captioned": np.array(form.captioned)},
        "class_names": np.array(form.class_names, np.str_),
        **broken.arrays("broken"),
    }


def _opened(path: Path, caption_key: str) -> tuple[Any, _Form]:
    """The footer of a file, and what its columns are; raises RearError where it has none that are fit."""
    import pyarrow as pa  # here, because other sources need none of it

    metadata, schema = _schema(path)
    captioned = caption_key in schema.names
    if IMAGE not in schema.names or not (captioned or LABEL in schema.names):
        raise RearError(
            f"{path} has the columns {', '.join(schema.names)}; it needs {IMAGE}, and {caption_key} "
            f"(config.data.caption_key) or {LABEL}"
        )
    kind, beside = schema.field(IMAGE).type, schema.field(caption_key if captioned else LABEL).type
    fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
    if "bytes" not in fields and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise RearError(f"{path}: the column {IMAGE} is {kind}; it needs encoded images as bytes")
    if pa.types.is_dictionary(beside):
        beside = beside.value_type
    fit = (pa.types.is_string, pa.types.is_large_string) if captioned else (pa.types.is_integer,)
    if not any(check(beside) for check in fit):
        column = caption_key if captioned else LABEL
        raise RearError(f"{path}: the column {column} is {beside}; it needs {'text' if captioned else 'integers'}")
    names = () if captioned else _class_names(schema.metadata or {})
    return metadata, _Form(f"{IMAGE}.bytes" if fields else IMAGE, captioned, names)


def _schema(path: Path) -> tuple[Any, Any]:
    """The footer of a file and the types of its columns; raises RearError where there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(str(error))
        raise RearError(f"{path} is no whole .parquet file ({reason}); copy it again or remove it") from None


def _class_names(metadata: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """Names of the classes, where Hugging Face datasets wrote them into the schema."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][LABEL]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _captionless(cells: Sequence[bytes | None]) -> dict[int, str]:
    """Why some of the captions of a group are of no use, by row in it."""
    reasons = {}
    for row, value in enumerate(cells):
        try:
            plain_caption(value or b"")
        except ValueError as error:
            reasons[row] = str(error)
    return reasons


def _labels(cells: Sequence[int | None]) -> tuple[list[int], dict[int, str]]:
    """The labels of a group, and why some of them are of no use, by row in it."""
    reasons = {row: f"its label is {value}" for row, value in enumerate(cells) if not 0 <= (value or 0) < 2**31}
    reasons |= {row: "it has no label" for row, value in enumerate(cells) if value is None}
    return [value for row, value in enumerate(cells) if row not in reasons], reasons


def _bytes_of(group: Any, column: str) -> int:
    """Uncompressed size of a column of a row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
