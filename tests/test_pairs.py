"""Sources of images with captions, and the one decoder of all sources."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from rear_jax.config import default
from rear_jax.data.batches import image_batches, ordered_batches
from rear_jax.data.sources import (
    fingerprint,
    kept_index,
    open_source,
    open_split,
    parquet,
    require_classes,
    row_groups,
    split_facts,
    webdataset,
)
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES, decode
from rear_jax.data.sources.interface import CaptionedSource, SourceSettings, captioned
from rear_jax.errors import RearError

CAPTIONS = ("a red fox", 'two cats, "one" black', "ein Fluß\nbei Nacht", "猫", "x" * 300, "the end", "a dog")
ALL = range(len(CAPTIONS))
KINDS = ("jsonl", "csv", "txt", "json", "struct", "raw")
TOLERANT = SourceSettings(max_broken_share=0.5)


def picture(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (9 + index, 8, 3), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_images(root: Path, count: int = len(CAPTIONS)) -> list[str]:
    (root / "deep").mkdir(parents=True, exist_ok=True)
    names = [f"deep/{index}.png" if index % 2 else f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        (root / name).write_bytes(encoded(picture(index)))
    return names


def write_jsonl(root: Path, rows: list[dict]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "metadata.jsonl"


def write_csv(root: Path, rows: list[tuple]) -> Path:
    with (root / "metadata.csv").open("w", newline="") as file:  # csv ends rows by CR LF
        csv.writer(file).writerows(rows)
    return root / "metadata.csv"


def records(count: int = len(CAPTIONS)) -> list[dict]:
    return [{"bytes": encoded(picture(index)), "path": f"{index}.png"} for index in range(count)]


def write_kind(kind: str, root: Path) -> tuple[str, str]:
    """Writes the pairs of `CAPTIONS` as `<root>/train`; the source and what it is opened by."""
    train = root / "train"
    train.mkdir()
    if kind in ("jsonl", "csv"):
        rows = list(zip(write_images(train), CAPTIONS, strict=True))
        if kind == "csv":
            write_csv(train, [("text", "file_name"), *(row[::-1] for row in rows)])
        else:
            write_jsonl(train, [{"file_name": name, "text": caption} for name, caption in rows])
        return "imagefolder", str(root)
    if kind in ("txt", "json"):
        for shard, indices in enumerate((range(4), range(4, len(CAPTIONS)))):
            members = {}
            for i in indices:
                text = CAPTIONS[i] if kind == "txt" else json.dumps({"text": CAPTIONS[i], "url": ""})
                members |= {f"{i:04}.{kind}": text.encode(), f"{i:04}.png": encoded(picture(i))}
            write_tar(train / f"{shard:05}.tar", members)
        return "webdataset", str(root)
    images = records() if kind == "struct" else [record["bytes"] for record in records()]
    pq.write_table(pa.table({"image": images[:5], "text": CAPTIONS[:5]}), train / "0.parquet", row_group_size=2)
    pq.write_table(pa.table({"image": images[5:], "text": CAPTIONS[5:]}), train / "1.parquet", row_group_size=2)
    return "parquet", str(root)


def check_pairs(source: CaptionedSource, numbers: Sequence[int] = ALL) -> None:
    """The source has the pictures and captions with these numbers, in this order."""
    assert captioned(source)
    assert len(source) == source.num_classes == len(numbers)
    for index, number in enumerate(numbers):
        image, label = source[index]
        assert label == index
        np.testing.assert_array_equal(image, picture(number))
        assert source.caption(index) == CAPTIONS[number].strip()


# --- one set in all forms


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_pairs_in_order(kind: str, tmp_path: Path):
    name, path = write_kind(kind, tmp_path)
    source = open_source(name, path, "train")
    check_pairs(source)
    check_pairs(open_source(name, str(tmp_path / "train"), ""))
    assert source[-1][1] == source[np.int64(len(source) - 1)][1] == len(source) - 1
    assert source.caption(np.int32(1)) == CAPTIONS[1]
    with pytest.raises(IndexError):
        source[len(source)]
    with pytest.raises(RearError, match="validation"):
        open_source(name, path, "validation")


def test_every_kind_has_the_same_fingerprint(tmp_path: Path):
    found = set()
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        found.add(fingerprint(open_source(*write_kind(kind, tmp_path / kind), "train")))
    assert len(found) == 1


def test_fingerprint_tells_captions_apart(tmp_path: Path):
    names = write_images(tmp_path)
    found = set()
    for captions in (CAPTIONS, CAPTIONS[::-1]):
        write_jsonl(tmp_path, [{"file_name": n, "text": c} for n, c in zip(names, captions, strict=True)])
        found.add(fingerprint(open_source("imagefolder", str(tmp_path), "")))
    assert len(found) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_two_processes_are_those_of_one(kind: str, tmp_path: Path):
    source = open_source(*write_kind(kind, tmp_path), "train")
    in_order = ordered_batches(source, image_size=8, batch_size=3)
    assert np.concatenate([batch["label"] for batch in in_order]).tolist() == [*ALL]

    def labels(**rest) -> list[int]:
        stream = image_batches(source, image_size=8, augment="none", batch_size=4, seed=1, **rest)
        found = [next(stream)["label"].tolist() for _ in range(3)]
        stream.close()
        return found

    shares = [labels(start_step=2, process_index=process, process_count=2) for process in range(2)]
    whole = labels(start_step=2)
    assert [first + second for first, second in zip(*shares, strict=True)] == whole
    assert sorted([*itertools.chain(*labels())][: len(ALL)]) == [*ALL]


def test_classes_are_needed_only_where_they_are(tmp_path: Path):
    data = default().data
    data.source, data.path = write_kind("jsonl", tmp_path)
    data.num_classes = 2
    assert captioned(open_split(data, "train"))
    facts = split_facts(data, "train")
    assert facts.captioned
    assert facts.num_images == len(CAPTIONS)
    with pytest.raises(RearError, match=r"config\.data\.num_classes is 2"):
        require_classes(facts, data.num_classes)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "struct"])
def test_caption_key(kind: str, tmp_path: Path):
    name, path = write_kind(kind, tmp_path)
    message = r"columns .*text.*config\.data\.caption_key" if kind == "struct" else "caption_key = 'blurb'.*keys .*text"
    with pytest.raises(RearError, match=message) as raised:
        open_source(name, path, "train", SourceSettings("blurb", 0.9))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share_that_is_none(share: float, tmp_path: Path):
    with pytest.raises(RearError, match=r"config\.data\.max_broken_share = .*: choose a share from 0 to below 1"):
        open_source(*write_kind("txt", tmp_path), "train", SourceSettings(max_broken_share=share))


# --- broken pairs


def break_jsonl(root: Path) -> tuple[str, str]:
    names = write_images(root / "train", 4)
    rows = [json.dumps({"file_name": names[i], "text": CAPTIONS[i]}).encode() for i in range(4)]
    empty, missing = (json.dumps(row).encode() for row in ({"file_name": names[2], "text": " "}, {"text": "no name"}))
    gone = json.dumps({"file_name": "gone.png", "text": "x"}).encode()
    lines = [rows[0], b"{", empty, b"", b'{"file_name": "1.png", "text": "\xff"}', missing, gone, rows[3]]
    (root / "train" / "metadata.jsonl").write_bytes(b"\r\n".join(lines))
    return "imagefolder", str(root)


def break_tar(root: Path) -> tuple[str, str]:
    images = [encoded(picture(i)) for i in range(4)]
    members = {"0.png": images[0], "0.txt": CAPTIONS[0].encode() + b"\r\n", "1.png": images[1], "1.txt": b"\xff"}
    members |= {"2.png": images[2], "lonely.txt": b"x", "4.png": images[2], "4.txt": b" \r\n"}
    members |= {"3.txt": CAPTIONS[3].encode(), "3.png": images[3]}
    write_tar(root / "train" / "0.tar", members)
    return "webdataset", str(root)


def break_parquet(root: Path) -> tuple[str, str]:
    (root / "train").mkdir()
    texts = [CAPTIONS[0].encode(), b"", None, b"\xff", CAPTIONS[3].encode()]
    images = [records()[i] for i in (0, 1, 1, 1, 3)]
    column = pa.array(texts, pa.binary()).view(pa.string())  # bad UTF-8 goes unseen
    pq.write_table(pa.table({"image": images, "text": column}), root / "train" / "0.parquet", row_group_size=2)
    return "parquet", str(root)


@pytest.mark.parametrize(
    ("breaks", "count", "total", "reasons"),
    [
        (break_jsonl, 6, 8, ("no JSON", "its text is empty", "no UTF-8")),
        (break_tar, 4, 6, ("1: no UTF-8 text", r"2: no \.txt, only \.png", r"lonely: no image, only \.txt")),
        (break_parquet, 3, 5, ("row 1: its text is empty", "row 2: its text is empty", "row 3: no UTF-8")),
    ],
)
def test_broken_pairs_are_left_out_and_named_once(breaks, count, total, reasons, tmp_path: Path, caplog):
    name, path = breaks(tmp_path)
    for _ in range(2):  # the second time from a kept index
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_pairs(open_source(name, path, "train", SourceSettings(max_broken_share=0.8)), (0, 3))
        (message,) = [record.getMessage() for record in caplog.records]
        assert f"left out {count} broken of {total}" in message
        assert re.search(".*".join(reasons), message)
        with pytest.raises(RearError, match=rf"{count} of {total} are broken.*max_broken_share = 0\.3") as raised:
            open_source(name, path, "train", SourceSettings(max_broken_share=0.3))
        assert "\n" not in str(raised.value)


def damage_image(kind: str, root: Path, index: int) -> tuple[str, str]:
    """`write_kind` with one image that no decoder reads."""
    name, path = write_kind(kind, root)
    content = encoded(picture(index))
    for file in sorted((root / "train").rglob("*")):
        if file.is_file() and content in (whole := file.read_bytes()):
            file.write_bytes(whole.replace(content, content[:40] + bytes(len(content) - 40)))
    return name, path


@pytest.mark.parametrize("kind", ["jsonl", "txt", "struct"])
def test_next_good_image_stands_in_with_its_own_caption(kind: str, tmp_path: Path, caplog):
    if kind == "struct":  # pages are compressed, so the row is written anew
        name, path = write_kind(kind, tmp_path)
        images = records()
        images[6] = {"bytes": b"no image", "path": ""}
        pq.write_table(pa.table({"image": images[5:], "text": CAPTIONS[5:]}), tmp_path / "train" / "1.parquet")
    else:
        name, path = damage_image(kind, tmp_path, 6)
    source = open_source(name, path, "train", SourceSettings(max_broken_share=0.2))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            image, label = source[6]
            assert label == 0
            np.testing.assert_array_equal(image, picture(0))
            assert source.caption(label) == CAPTIONS[0]
    assert len([record for record in caplog.records if "takes its place" in record.getMessage()]) == 1
    strict = open_source(name, path, "train", SourceSettings(max_broken_share=0.1))
    with pytest.raises(RearError, match=r"not a readable image .*1 of 7 are broken so far"):
        strict[6]


def test_all_images_broken_stops(tmp_path: Path):
    members = {f"{i}.{suffix}": b"x" for i in range(3) for suffix in ("png", "txt")}
    write_tar(tmp_path / "0.tar", members)
    source = open_source("webdataset", str(tmp_path), "", SourceSettings(max_broken_share=0.99))
    with pytest.raises(RearError, match="3 of 3 are broken so far"):
        source[0]


# --- imagefolder


@pytest.mark.parametrize("name", ["../0.png", "/etc/passwd", "a/../../0.png", ".."])
def test_paths_out_of_the_folder_are_refused(name: str, tmp_path: Path):
    write_jsonl(tmp_path / "train", [{"file_name": name, "text": "x"}])
    with pytest.raises(RearError, match="which is outside its folder"):
        open_source("imagefolder", str(tmp_path), "train", TOLERANT)


def test_an_image_may_have_several_captions(tmp_path: Path):
    (name,) = write_images(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": f"./{name}", "text": text} for text in ("one", "two")])
    source = open_source("imagefolder", str(tmp_path), "")
    assert [source.caption(index) for index in range(2)] == ["one", "two"]
    np.testing.assert_array_equal(source[1][0], picture(0))


def test_images_without_rows_are_broken_and_other_files_left_out(tmp_path: Path, caplog):
    names = write_images(tmp_path, 3)
    write_jsonl(tmp_path, [{"file_name": name, "text": "x"} for name in names[:2]])
    for hidden in (".ipynb_checkpoints/0.png", "._0.png", "__MACOSX/0.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    source = open_source("imagefolder", str(tmp_path), "", TOLERANT)
    assert len(source) == 2
    messages = [record.getMessage() for record in caplog.records]
    assert any("left out 1 files or folders" in message and "notes.txt" in message for message in messages)
    assert any("left out 1 broken of 3: 2.png has no row in metadata.jsonl" in message for message in messages)


def test_csv_with_a_mark_and_unix_ends(tmp_path: Path):
    names = write_images(tmp_path, 2)
    rows = f'file_name,text\n{names[0]},"a\nb"\n\n{names[1]},c\n'
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    source = open_source("imagefolder", str(tmp_path), "")
    assert [source.caption(index) for index in range(2)] == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'file_name,text\n0.png,"open\n', "is no CSV from byte 15 on"),
        (b"", "2 of 2 are broken"),
    ],
)
def test_csv_of_no_form(content: bytes, message: str, tmp_path: Path):
    write_images(tmp_path, 2)
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(RearError, match=message):
        open_source("imagefolder", str(tmp_path), "", TOLERANT)


def test_a_folder_needs_one_metadata_file(tmp_path: Path):
    write_images(tmp_path, 1)
    with pytest.raises(RearError, match=r"neither of metadata\.jsonl and metadata\.csv"):
        open_source("imagefolder", str(tmp_path), "")
    write_jsonl(tmp_path, [])
    with pytest.raises(RearError, match="1 of 1 are broken"):
        open_source("imagefolder", str(tmp_path), "", TOLERANT)
    write_csv(tmp_path, [("file_name", "text")])
    with pytest.raises(RearError, match="both of"):
        open_source("imagefolder", str(tmp_path), "")


def test_metadata_that_changes_is_noticed(tmp_path: Path):
    source = open_source(*write_kind("jsonl", tmp_path), "train")
    (tmp_path / "train" / "metadata.jsonl").write_text("{}\n" * 50)
    with pytest.raises(RearError, match="its caption can no longer be read"):
        source.caption(3)
    with pytest.raises(RearError, match="start the run again"):
        source[3]


# --- webdataset


def test_shards_are_found_by_split_and_pattern(tmp_path: Path):
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar", {f"{split}.png": encoded(picture(0)), f"{split}.txt": split.encode()})
    assert open_source("webdataset", str(tmp_path), "test").caption(0) == "test"
    assert open_source("webdataset", f"{tmp_path}/{{split}}-*.tar", "train").caption(0) == "train"
    assert len(open_source("webdataset", f"{tmp_path}/*.tar", "")) == 2
    assert len(open_source("webdataset", str(tmp_path), "")) == 2
    assert len(open_source("webdataset", str(tmp_path / "test-0.tar"), "")) == 1
    write_tar(tmp_path / "deep" / "val" / "7.tar", {"a.png": encoded(picture(0)), "a.txt": b"a"})
    assert len(open_source("webdataset", f"{tmp_path}/deep/{{split}}", "val")) == 1
    for path in (tmp_path / "*.tar", tmp_path / "test-0.tar"):
        with pytest.raises(RearError, match="gives every split the same files"):
            open_source("webdataset", str(path), "train")
    with pytest.raises(RearError, match=r"holds no \.tar files of the split 'tra'"):
        open_source("webdataset", str(tmp_path), "tra")
    with pytest.raises(RearError, match="does not exist"):
        open_source("webdataset", str(tmp_path / "nowhere"), "")


def test_classes_of_webdataset(tmp_path: Path):
    members = {}
    for index, label in enumerate((b"3", b"0\n", b"cat", b"-1")):
        members |= {f"a/{index}.x.png": b"", f"a/{index}.png": encoded(picture(index)), f"a/{index}.cls": label}
        members[f"a/{index}.json"] = b'{"width": 3}'
    write_tar(tmp_path / "0.tar", members)
    source = open_source("webdataset", str(tmp_path), "", TOLERANT)
    assert not captioned(source)
    assert (len(source), source.num_classes) == (2, 4)
    assert [source[index][1] for index in range(2)] == [3, 0]
    np.testing.assert_array_equal(source[1][0], picture(1))


def test_long_names_and_pax(tmp_path: Path):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = {}
        for index in range(2):
            key = "deep/" * 40 + f"ä{index}"
            members |= {f"{key}.PNG": encoded(picture(index)), f"{key}.txt": CAPTIONS[index].encode()}
        path = write_tar(tmp_path / str(form) / "0.tar", members, form)
        check_pairs(open_source("webdataset", str(path.parent), ""), (0, 1))


def test_side_files_of_shards_are_left_out(tmp_path: Path, caplog):
    members = {"README.md": b"x", "._0.png": b"", "__MACOSX/0.png": b"", "0.png": encoded(picture(0)), "0.txt": b"a"}
    write_tar(tmp_path / "0.tar", members)
    assert len(open_source("webdataset", str(tmp_path), "")) == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 1 files" in message
    assert "README" in message


def test_index_is_kept_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    build = webdataset._index
    monkeypatch.setattr(webdataset, "_index", lambda *arguments: made.append(1) or build(*arguments))
    name, path = write_kind("txt", tmp_path)
    shard = tmp_path / "train" / "00001.tar"

    def open_again(**settings) -> CaptionedSource:
        made.clear()
        return open_source(name, path, "train", SourceSettings(**settings))

    check_pairs(open_again())
    assert made
    check_pairs(open_again(max_broken_share=0.1))
    assert not made
    open_again(caption_key="other")  # of no use to .txt, but the index does not know
    assert made
    write_tar(shard, {"0004.png": encoded(picture(5)), "0004.txt": CAPTIONS[5].encode()})
    check_pairs(open_again(), (*range(4), 5))
    assert made
    state = shard.stat()
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    open_again()
    assert made
    write_tar(tmp_path / "train" / "00002.tar", {"6.png": encoded(picture(6)), "6.txt": CAPTIONS[6].encode()})
    check_pairs(open_again(), (*range(4), 5, 6))
    assert made
    for kept in (tmp_path / "train").glob(".rear_jax-*.npz"):
        kept.write_bytes(kept.read_bytes()[:100])
    check_pairs(open_again(), (*range(4), 5, 6))
    assert made
    assert not [file for file in (tmp_path / "train").iterdir() if ".tmp" in file.name]


def test_index_of_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    name, path = write_kind("txt", tmp_path)
    write = kept_index._write

    def refused(place: Path, arrays) -> None:
        if place.parent == tmp_path / "train":
            raise PermissionError(place)
        write(place, arrays)

    monkeypatch.setattr(kept_index, "_write", refused)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check_pairs(open_source(name, path, "train"))
    assert len(list((tmp_path / "cache" / "rear_jax").iterdir())) == 1
    check_pairs(open_source(name, path, "train"))
    (tmp_path / "cache" / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache" / "file"))
    check_pairs(open_source(name, path, "train"))
    assert "can be kept in none of" in caplog.records[-1].getMessage()


def test_cut_and_damaged_shards_are_refused(tmp_path: Path):
    name, path = write_kind("txt", tmp_path)
    shard = tmp_path / "train" / "00001.tar"
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    header = members[2].offset
    bad_header = whole[:header] + b"?" * 40 + whole[header + 40 :]
    cuts = (members[1].offset_data + 50, header + 100, 100, 0)
    for damaged in (*(whole[:cut] for cut in cuts), bad_header, b"x" * 600):
        shard.write_bytes(damaged)
        with pytest.raises(RearError, match=r"00001\.tar is damaged or cut off") as raised:
            open_source(name, path, "train", TOLERANT)
        assert "\n" not in str(raised.value)
    shard.write_bytes(gzip.compress(whole))
    with pytest.raises(RearError, match=r"00001\.tar is compressed.*gzip -d"):
        open_source(name, path, "train", TOLERANT)
    shard.write_bytes(whole)
    source = open_source(name, path, "train")
    shard.write_bytes(whole[:100])
    with pytest.raises(RearError, match="has become shorter since it was indexed"):
        source[5]
    with pytest.raises(RearError, match="has become shorter since it was indexed"):
        source.caption(5)


def test_shards_without_an_end_are_warned_of(tmp_path: Path, caplog):
    name, path = write_kind("txt", tmp_path)
    shard = tmp_path / "train" / "00001.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-2:]
    shard.write_bytes(shard.read_bytes()[: last[0].offset])  # without the last pair
    check_pairs(open_source(name, path, "train"), range(6))
    assert "00001.tar has no mark at its end" in caplog.text


def test_compressed_shards_are_named(tmp_path: Path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b"x" * 1000))
    with pytest.raises(RearError, match=r"0\.tar\.gz is compressed"):
        open_source("webdataset", str(tmp_path), "")


# --- parquet


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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": [b"x"], "text": ["x"]}, "has the columns img, text; it needs image, and text"),
        ({"image": [b"x"], "caption": ["x"]}, "has the columns image, caption; it needs image, and text"),
        ({"image": [1], "text": ["x"]}, "the column image is int64; it needs encoded images"),
        ({"image": [{"path": "x"}], "text": ["x"]}, "it needs encoded images as bytes"),
        ({"image": [b"x"], "text": [["x"]]}, "the column text is list.*; it needs text"),
        ({"image": [b"x"], "label": ["x"]}, "the column label is string; it needs integers"),
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


# --- the decoder and class folders


def save(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of all modes, and the grey levels that each of their 2 x 3 pixels has in all three channels."""
    grey = np.array([[0, 10, 128], [200, 254, 255]], np.uint8)
    flat = Image.fromarray(grey)
    palette = Image.fromarray(grey)
    palette = palette.convert("P")
    alpha = Image.fromarray(np.stack([grey, np.full_like(grey, 3)], -1))
    none = Image.new("L", (3, 2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    return {
        "L": (save(flat, "PNG"), grey),
        "P": (save(palette, "PNG"), grey),
        "P with transparency": (save(palette, "PNG", transparency=bytes([0, 7])), grey),
        "LA": (save(alpha, "PNG"), grey),
        "RGBA": (save(alpha.convert("RGBA"), "PNG"), grey),
        "1": (save(flat.point(lambda v: 255 * (v > 100)).convert("1"), "PNG"), np.where(grey > 100, 255, 0)),
        "16-bit PNG": (save(deep, "PNG"), grey),
        "16-bit TIFF": (save(deep, "TIFF"), grey),
        "16-bit PGM": (b"P5 3 2 65535\n" + (grey.astype(">u2") * 257).tobytes(), grey),
        "CMYK": (save(Image.merge("CMYK", [none, none, none, flat.point(lambda v: 255 - v)]), "TIFF"), grey),
        "BMP": (save(flat, "BMP"), grey),
        "GIF, first frame": (save(flat, "GIF", save_all=True, append_images=[Image.new("L", (3, 2), 77)]), grey),
    }


@pytest.mark.parametrize("mode", modes())
def test_decode_of_all_modes(mode: str):
    file, grey = modes()[mode]
    found = decode(file, "x")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.repeat(grey[:, :, None], 3, axis=2))


def test_sixteen_bits_are_scaled_to_the_nearest():
    levels = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    found = decode(save(Image.fromarray(levels), "PNG"), "x")
    assert found[0, :, 1].tolist() == [0, 0, 1, 1, 2, 255]


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation: int):
    """As PIL's own `exif_transpose` turns it; 0 and 9 mean nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(Image.fromarray(picture(3)), "PNG", exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode(file, "x"), expected)
    assert decode(file, "x").shape == ((8, 12, 3) if 5 <= orientation <= 8 else (12, 8, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_counts_once_in_every_format(kind: str):
    if kind == "AVIF" and ".avif" not in IMAGE_SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    turned, plain = Image.Exif(), Image.fromarray(picture(3))
    turned[0x0112] = 6
    expected = np.rot90(decode(save(plain, kind), "x"), -1)  # the camera was turned to the left
    np.testing.assert_array_equal(decode(save(plain, kind, exif=turned), "x"), expected)


def test_damaged_exif_leaves_the_picture_as_it_is():
    file = encoded(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(file, "x").shape == picture(0).shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_cut_pictures_are_refused(kind: str):
    if f".{kind.lower()}" not in IMAGE_SUFFIXES and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    file = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), kind)
    assert decode(file, "x").shape == (40, 40, 3)
    for length in (0, 3, 20, len(file) // 2):
        with pytest.raises(RearError, match=r"^x is not a readable image") as raised:
            decode(file[:length], "x")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_of_no_known_range_are_refused(pixels: np.ndarray):
    with pytest.raises(RearError, match="its pixels"):
        decode(save(Image.fromarray(pixels), "TIFF"), "x")


def test_random_bytes_never_escape_as_other_errors():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        whole = encoded(picture(0), kind)
        for _ in range(30):
            spoilt = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                spoilt[place] = rng.integers(256)
            with contextlib.suppress(RearError):
                assert decode(bytes(spoilt), "x").dtype == np.uint8


def test_class_folders_ignore_what_is_hidden_and_count_the_rest(tmp_path: Path, caplog):
    for name in ("ant/0.gif", "ant/1.TIFF", "ant/._2.png", "ant/.ipynb_checkpoints/0.png", "ant/more/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0), "TIFF" if "TIFF" in name else "GIF"))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "stray.png").write_bytes(b"")
    source = open_source("folder", str(tmp_path), "")
    assert source.class_names == ("ant",)
    assert [file.name for file in source.files] == ["0.gif", "1.TIFF"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 2 files or folders" in message
    assert "stray.png" in message
    assert "ant/more" in message


def test_class_folders_replace_a_broken_image(tmp_path: Path):
    for index, name in enumerate(("ant/0.png", "bee/0.png", "bee/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(index)))
    (tmp_path / "ant/0.png").write_bytes(b"")
    image, label = open_source("folder", str(tmp_path), "", TOLERANT)[0]
    assert label == 1
    np.testing.assert_array_equal(image, picture(1))
