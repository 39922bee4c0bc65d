"""Images in .parquet files, with captions or with classes, in the form of data sets on the Hugging Face hub.

The column `config.data.image_key` holds encoded images, as bytes or as a record with `bytes`. The column
`config.data.caption_key` holds the captions; where there is none, the column `config.data.label_key` holds numbers or
names of classes. Files are read in the order of their names. The index comes from the captions or labels; no image is
read for it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken, Tally
from rear_jax.data.sources.classes import by_training, numbered
from rear_jax.data.sources.encoded import EncodedImages, EncodedPairs
from rear_jax.data.sources.files import split_files
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.data.sources.kept_index import Arrays, kept_index
from rear_jax.data.sources.parquet_form import Form, form_of
from rear_jax.data.sources.row_groups import RowGroups, read_column
from rear_jax.data.sources.texts import class_name, plain_caption
from rear_jax.errors import RearError

log = logging.getLogger(__name__)

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

    def __init__(self, name: str, rows: Rows, settings: SourceSettings, broken: Broken):
        super().__init__(name, rows.length, broken)
        self._rows, self._caption_key = rows, settings.caption_key
        self.contents = contents.of_files(rows.groups.files, settings.caption_key, *settings.unusual_keys)

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _image(self, index: int) -> bytes:
        return self._rows.encoded(index)

    def _caption(self, index: int) -> str:
        return plain_caption(self._rows.groups.cell(self._rows.row(index), self._caption_key) or b"")


class ParquetClasses(EncodedImages):
    """Images with numbers of classes."""

    def __init__(
        self,
        name: str,
        rows: Rows,
        labels: np.ndarray,
        class_names: tuple[str, ...],
        unusual_keys: tuple[str, ...],
        broken: Broken,
    ):
        super().__init__(name, len(class_names) or int(labels.max()) + 1, class_names, broken)
        self._rows, self._labels = rows, labels
        self.contents = contents.of_files(rows.groups.files, class_names, *unusual_keys)

    def __len__(self) -> int:
        return len(self._labels)

    def _where(self, index: int) -> str:
        return self._rows.where(index)

    def _read(self, index: int) -> tuple[bytes, int]:
        return self._rows.encoded(index), int(self._labels[index])


def open_parquet(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
    files = split_files(path, split, (".parquet",))
    name = files[0].parent.name
    broken = Broken(name, settings.max_broken_share)
    index = _kept(files, settings)
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
        return ParquetPairs(name, rows, settings, broken)
    labels, names = by_training(index["class_names"].tolist(), index["labels"], settings.class_names, path)
    return ParquetClasses(name, rows, labels, names, settings.unusual_keys, broken)


def class_names(path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the classes of a split by number, () where its files have none; raises RearError as `open_parquet`."""
    return tuple(_kept(split_files(path, split, (".parquet",)), settings)["class_names"].tolist())


def _kept(files: Sequence[Path], settings: SourceSettings) -> Arrays:
    keys = (settings.caption_key, *settings.unusual_keys)
    return kept_index(files, f"parquet {' '.join(keys)}", lambda: _index(files, settings))


def _index(files: Sequence[Path], settings: SourceSettings) -> Arrays:
    """What is kept of the files; raises RearError where their columns are not as they should be."""
    group_file, group_rows, group_bytes, bad, labels = [], [], [], [], []
    broken, form = Tally(), form_of(files[0], settings)[1]
    for number, path in enumerate(files):
        metadata, found = form_of(path, settings)
        if found != form:
            raise RearError(f"{path} has other columns or classes than {files[0]}; leave it out")
        before, in_file = sum(group_rows), 0  # rows
        for group in range(metadata.num_row_groups):
            facts = metadata.row_group(group)
            cells = read_column(path, form.beside, group).to_pylist()
            if len(cells) != facts.num_rows:
                raise RearError(f"{path}: row group {group} has {len(cells)} of {facts.num_rows} rows; copy it again")
            values, reasons = _values(cells, form)
            labels += values
            for row, reason in reasons.items():
                bad.append(before + in_file + row)
                broken.add(f"{path}, row {in_file + row}: {reason}")
            group_file.append(number)
            group_rows.append(facts.num_rows)
            group_bytes.append(_bytes_of(facts, form.image))
            in_file += facts.num_rows
    names, labels = numbered(labels) if form.named else (form.class_names, labels)
    numbers = {"group_file": group_file, "group_rows": group_rows, "group_bytes": group_bytes, "bad": bad}
    return {
        **{name: np.array(values, np.int64) for name, values in (numbers | {"labels": labels}).items()},
        **{"image": np.array(form.image), "captioned": np.array(form.captioned)},
        "class_names": np.array(names, np.str_),
        **broken.arrays("broken"),
    }


def _values(cells: Sequence[Any], form: Form) -> tuple[list, dict[int, str]]:
    """The good labels or names of a group, none of captions, and why its other cells are of no use, by row in it."""
    if not form.captioned and not form.named:
        return _labels(cells)
    names, reasons = [], {}
    for row, value in enumerate(cells):
        try:
            text = plain_caption(value or b"")
            names += [] if form.captioned else [class_name(text)]
        except ValueError as error:
            reasons[row] = str(error)
    return names, reasons


def _labels(cells: Sequence[int | None]) -> tuple[list[int], dict[int, str]]:
    """The labels of a group, and why some of them are of no use, by row in it."""
    reasons = {row: f"its label is {value}" for row, value in enumerate(cells) if not 0 <= (value or 0) < 2**31}
    reasons |= {row: "it has no label" for row, value in enumerate(cells) if value is None}
    return [value for row, value in enumerate(cells) if row not in reasons], reasons


def _bytes_of(group: Any, column: str) -> int:
    """Uncompressed size of a column of a row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
