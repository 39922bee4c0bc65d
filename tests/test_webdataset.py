"""Images with captions or classes in shards of tar."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from rear_jax.data.sources import kept_index, open_source, webdataset
from rear_jax.data.sources.interface import CaptionedSource, SourceSettings, captioned
from rear_jax.errors import RearError
from tests.toy_pairs import CAPTIONS, TOLERANT, check_pairs, encoded, picture, write_kind, write_tar


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


def with_json(labels: list, suffix: str = "json") -> dict[str, bytes]:
    members = {}
    for index, label in enumerate(labels):
        content = json.dumps({"label": label, "width": 3}) if suffix == "json" else str(label)
        members |= {f"{index}.jpeg": encoded(picture(index)), f"{index}.{suffix}": content.encode()}
    return members


def test_classes_in_json(tmp_path: Path):
    write_tar(tmp_path / "train-0.tar", with_json([2, "1", None, -1, True, 0]))
    numbers = open_source("webdataset", str(tmp_path), "train", TOLERANT)
    assert ([numbers[index][1] for index in range(3)], numbers.num_classes) == ([2, 1, 0], 3)
    np.testing.assert_array_equal(numbers[2][0], picture(5))
    write_tar(tmp_path / "names" / "train-0.tar", with_json(["cat", "ant", "x" * 999, " "]))
    write_tar(tmp_path / "names" / "test-0.tar", with_json(["cat"]))
    write_tar(tmp_path / "names" / "val-0.tar", with_json(["dog"]))
    names = open_source("webdataset", str(tmp_path / "names"), "train", TOLERANT)
    assert ([names[index][1] for index in range(2)], names.class_names) == ([1, 0], ("ant", "cat"))
    of_training = SourceSettings(class_names=names.class_names)
    assert open_source("webdataset", str(tmp_path / "names"), "test", of_training)[0][1] == 1
    with pytest.raises(RearError, match="classes that the training split lacks: dog"):
        open_source("webdataset", str(tmp_path / "names"), "val", of_training)


def test_classes_where_captions_stand_too(tmp_path: Path):
    write_tar(tmp_path / "0.tar", with_json([3, 1]) | with_json(["a red fox", "a dog"], "txt"))
    assert captioned(open_source("webdataset", str(tmp_path), ""))
    source = open_source("webdataset", str(tmp_path), "", SourceSettings(caption_key=""))
    assert [source[index][1] for index in range(2)] == [3, 1]
    (tmp_path / "0.tar").unlink()
    write_tar(tmp_path / "1.tar", with_json(["cat", "ant"], "txt"))
    source = open_source("webdataset", str(tmp_path), "", SourceSettings(caption_key=""))
    assert ([source[index][1] for index in range(2)], source.class_names) == ([1, 0], ("ant", "cat"))


def test_missing_classes_are_broken_and_keys_that_come_twice_are_told(tmp_path: Path, caplog):
    members = with_json([0, 1, 2], "cls")
    del members["1.cls"], members["2.jpeg"]
    with tarfile.open(write_tar(tmp_path / "0.tar", members), "a") as tar:
        content = encoded(picture(5))
        info = tarfile.TarInfo("0.jpeg")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with pytest.raises(RearError, match=r"0\.tar, 1: no \.cls, only \.jpeg.*2 of 3 are broken"):
        open_source("webdataset", str(tmp_path), "")
    source = open_source("webdataset", str(tmp_path), "", SourceSettings(max_broken_share=0.9))
    assert len(source) == 1
    np.testing.assert_array_equal(source[0][0], picture(5))
    assert "0.jpeg, of which there is a later one" in caplog.text


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
