"""Images with captions or classes in Parquet files."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rear_jax.data.sources import open_source, parquet, row_groups
from rear_jax.data.sources.interface import SourceSettings, captioned
from rear_jax.errors import RearError
from tests.toy_pairs import CAPTIONS, TOLERANT, check_pairs, picture, records, write_kind


def test_classes_of_parquet(tmp_path: Path):
    (tmp_path / "data").mkdir()
    features = {"info": {"features": {"label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"}}}}
    for split, labels in (("train", [2, -1, None, 0]), ("test", [1, 1, 1, 1])):
        columns = pa.table({"image": records(4), "label": labels})
        if split == "train":
            columns = columns.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(columns, tmp_path / "data" / f"{split}-00000-of-00001.parquet", row_group_size=3)
    source = open_source("parquet", str(tmp_path), "train", TOLERANT)
    assert not captioned(source)
    assert source.class_names == ("ant", "bee", "cat")
    assert [source[index][1] for index in range(2)] == [2, 0]
    np.testing.assert_array_equal(source[1][0], picture(3))
    assert open_source("parquet", str(tmp_path), "test").num_classes == 2


@pytest.mark.parametrize("dictionary", [False, True])
def test_classes_of_parquet_may_be_names(dictionary: bool, tmp_path: Path):
    for split, names in (("train", ["bee", "ant", None, " ", "cat", "bee"]), ("test", ["cat", "ant"])):
        labels = pa.array(names).dictionary_encode() if dictionary else pa.array(names)
        table = pa.table({"image": records(len(names)), "label": labels})
        pq.write_table(table, tmp_path / f"{split}-0.parquet", row_group_size=4)
    train = open_source("parquet", str(tmp_path), "train", TOLERANT)
    assert train.class_names == ("ant", "bee", "cat")
    assert [train[index][1] for index in range(4)] == [1, 0, 2, 1]
    np.testing.assert_array_equal(train[2][0], picture(4))
    test = open_source("parquet", str(tmp_path), "test", SourceSettings(class_names=train.class_names))
    assert [test[index][1] for index in range(2)] == [2, 0]
    assert test.num_classes == 3


def test_columns_of_other_names(tmp_path: Path):
    features = {"info": {"features": {"fine": {"names": ["ant", "bee"]}, "coarse": {"names": ["animal"]}}}}
    table = pa.table({"img": records(2), "fine": [1, 0], "coarse": [0, 0], "text": ["a", "b"]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "0.parquet")
    settings = SourceSettings(caption_key="", image_key="img", label_key="fine")
    fine = open_source("parquet", str(tmp_path), "", settings)
    assert (fine.class_names, fine[0][1]) == (("ant", "bee"), 1)
    coarse = open_source("parquet", str(tmp_path), "", settings._replace(label_key="coarse"))
    assert (coarse.class_names, coarse[0][1]) == (("animal",), 0)
    assert coarse.contents != fine.contents
    assert open_source("parquet", str(tmp_path), "", settings._replace(caption_key="text")).caption(1) == "b"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"x"], "text": ["x"]}, r"has the columns img, text; it needs image \(config\.data\.image_key\)"),
        ({"image": [b"x"], "caption": ["x"]}, r"has the columns image, caption; it needs .*, and text \(config"),
        ({"image": [1], "text": ["x"]}, "the column image is int64; it needs encoded images"),
        ({"image": [{"path": "x"}], "text": ["x"]}, "it needs encoded images as bytes"),
        ({"image": [b"x"], "text": [["x"]]}, "the column text is list.*; it needs text"),
        ({"image": [b"x"], "label": [0.5]}, "the column label is double; it needs integers or text"),
        ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, "holds no rows"),
    ],
)
def test_parquet_columns_that_do_not_fit(columns: dict, message: str, tmp_path: Path):
    pq.write_table(pa.table(columns), tmp_path / "0.parquet")
    with pytest.raises(RearError, match=message) as raised:
        open_source("parquet", str(tmp_path), "", TOLERANT)
    assert "\n" not in str(raised.value)


def test_parquet_files_must_be_alike_and_whole(tmp_path: Path):
    name, path = write_kind("struct", tmp_path)
    file = tmp_path / "train" / "1.parquet"
    whole = file.read_bytes()
    for damaged in (whole[:-20], whole[:100], b""):
        file.write_bytes(damaged)
        with pytest.raises(RearError, match=r"1\.parquet is no whole \.parquet file") as raised:
            open_source(name, path, "train", TOLERANT)
        assert "\n" not in str(raised.value)
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), file)
    with pytest.raises(RearError, match="has other columns or classes"):
        open_source(name, path, "train", TOLERANT)


def test_missing_images_and_damaged_pages_of_parquet(tmp_path: Path):
    images = [*records(3), {"bytes": None, "path": "far.png"}, *records(7)[4:]]
    file = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": images, "text": CAPTIONS}), file, row_group_size=2, compression="none")
    source = open_source("parquet", str(tmp_path), "", TOLERANT)
    assert source[3][1] == 4
    whole, spoilt = file.read_bytes(), pq.ParquetFile(file).metadata.row_group(2).column(0)
    start = spoilt.dictionary_page_offset or spoilt.data_page_offset
    file.write_bytes(whole[:start] + b"\xff" * 30 + whole[start + 30 :])
    source = open_source("parquet", str(tmp_path), "", TOLERANT)
    assert source[4][1] == source[5][1] == 6
    file.write_bytes(whole)
    assert source[4][1] == 4  # what failed is not kept
    pq.write_table(pa.table({"image": records(1), "text": ["x"]}), file)
    with pytest.raises(RearError, match="has fewer rows than when it was indexed; start the run again"):
        source.caption(1)


def test_few_groups_are_read_and_few_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = []

    def counted(path: Path, column: str, group: int):
        read.append((path.name, column, group))
        return read_column(path, column, group)

    read_column = row_groups.read_column
    monkeypatch.setattr(row_groups, "read_column", counted)
    where = write_kind("raw", tmp_path)
    check_pairs(open_source(*where, "train"))
    assert len(read) == len(set(read)) == 2 * 4  # images and captions of groups of 2, 2, 1 and 2 rows
    read.clear()
    monkeypatch.setattr(row_groups, "BYTES_KEPT", 1)
    source = open_source(*where, "train")
    assert [source[index][1] for index in (0, 1, 2, 6, 5, 0)] == [0, 1, 2, 6, 5, 0]
    assert [(file, group) for file, _, group in read] == [
        *(("0.parquet", 0), ("0.parquet", 1), ("1.parquet", 0), ("0.parquet", 0))
    ]


def test_threads_read_the_same_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_groups, "BYTES_KEPT", 2000)
    source = open_source(*write_kind("struct", tmp_path), "train")
    numbers = np.random.default_rng(0).integers(0, len(source), 400).tolist()
    with ThreadPoolExecutor(8) as threads:
        for number, (image, label) in zip(numbers, threads.map(source.__getitem__, numbers), strict=True):
            assert label == number
            np.testing.assert_array_equal(image, picture(number))


def test_large_row_groups_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(parquet, "LARGE_GROUP", 100)
    open_source(*write_kind("struct", tmp_path), "train")
    assert "row_group_size=100" in caplog.text
