"""Class folders inside .zip and .tar files."""

import gzip
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rear_jax.data.sources import archives, fingerprint, open_source, zip_members
from rear_jax.data.sources.interface import SourceSettings
from rear_jax.errors import RearError
from tests.toy_pairs import TOLERANT, encoded, picture, write_tar
from tests.toy_sources import pictures, write_form, write_zip

WRITE = {"zip": write_zip, "tar": write_tar}


def images(*names: str) -> dict[str, bytes]:
    return {name: encoded(picture(index)) for index, name in enumerate(names)}


def spoil_first(file: Path, flag: int = 1, method: int = 0) -> Path:
    """Gives the first member of a .zip other flags (1 = it is encrypted) and another way of packing."""
    whole = bytearray(file.read_bytes())
    entry = whole.index(b"PK\1\2")  # of that member in the directory
    whole[entry + 8], whole[entry + 10] = flag, method
    file.write_bytes(whole)
    return file


def test_archives_equal_the_unpacked_folder(tmp_path: Path):
    found = set()
    for form in ("folder", "zip", "zip deflated", "tar"):
        found.add(fingerprint(open_source(*write_form(form, tmp_path / form.replace(" ", "_"), pictures()), "train")))
    assert len(found) == 1


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize(
    ("names", "split", "class_names"),
    [
        (("train/ant/0.png", "train/bee/0.png", "test/cat/0.png"), "train", ("ant", "bee")),
        (("photos/train/ant/0.png", "photos/train/bee/0.png", "photos/test/cat/0.png"), "train", ("ant", "bee")),
        (("./train/ant/0.png", "./train/bee/0.png"), "train", ("ant", "bee")),
        (("ant/0.png", "bee/0.png"), "", ("ant", "bee")),
        (("photos/ant/0.png", "photos/bee/0.png"), "", ("ant", "bee")),
        (("ant/0.png", "ant/1.png"), "", ("ant",)),
    ],
)
def test_a_folder_around_everything_does_not_count(
    kind: str, names: tuple[str, ...], split: str, class_names: tuple[str, ...], tmp_path: Path
):
    source = open_source("archive", str(WRITE[kind](tmp_path / f"a.{kind}", images(*names))), split)
    assert source.class_names == class_names
    assert len(source) == 2
    np.testing.assert_array_equal(source[1][0], picture(1))


def test_several_archives_are_one_set(tmp_path: Path):
    """Parts of one set, or a class each, as ImageNet's training images come."""
    write_zip(tmp_path / "train-0.zip", images("ant/0.png", "bee/0.png"))
    write_tar(tmp_path / "train-1.tar", images("cat/0.png", "ant/0.png"))
    source = open_source("archive", str(tmp_path), "train")
    assert ([source[index][1] for index in range(4)], source.class_names) == ([0, 0, 1, 2], ("ant", "bee", "cat"))
    np.testing.assert_array_equal(source[1][0], picture(1))
    for name in ("n01440764", "n01443537"):
        write_tar(tmp_path / "val" / f"{name}.tar", images(f"{name}_1.JPEG"))
    assert open_source("archive", str(tmp_path), "val").class_names == ("n01440764", "n01443537")


@pytest.mark.parametrize("kind", WRITE)
def test_what_is_hidden_strange_or_outside_is_left_out(kind: str, tmp_path: Path, caplog):
    names = ("ant/0.png", "ant/more/1.png", "stray.png", "../ant/2.png", "/ant/3.png", "ant/../../4.png")
    hidden = ("__MACOSX/ant/0.png", "ant/._0.png", ".git/ant/0.png")
    archive = WRITE[kind](tmp_path / f"a.{kind}", images(*names, *hidden) | {"ant/notes.txt": b"x"})
    assert len(open_source("archive", str(archive), "")) == 1
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 6 files or folders" in message
    assert sorted(entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".rear_jax")) == [
        archive.name
    ]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", WRITE)
def test_the_last_of_two_of_one_name_is_taken(kind: str, tmp_path: Path, caplog):
    archive = WRITE[kind](tmp_path / f"a.{kind}", images("ant/0.png"))
    content = encoded(picture(5))
    if kind == "zip":
        with zipfile.ZipFile(archive, "a") as file:
            file.writestr("ant/0.png", content)
    else:
        whole = write_tar(tmp_path / "b.tar", {"ant/0.png": content}).read_bytes()
        length = 512 + -(-len(encoded(picture(0))) // 512) * 512
        archive.write_bytes(archive.read_bytes()[:length] + whole)
    source = open_source("archive", str(archive), "")
    assert len(source) == 1
    np.testing.assert_array_equal(source[0][0], picture(5))
    assert "of which there is a later one" in caplog.text


def test_splits_that_are_not_there_are_named(tmp_path: Path):
    archive = write_zip(tmp_path / "a.zip", images("photos/Train/ant/0.png", "photos/Test/ant/0.png"))
    with pytest.raises(RearError, match=r"has no images in train/<class>/; its folders are: Test, Train"):
        open_source("archive", str(archive), "train")
    other = tmp_path / "a.rar"
    other.write_bytes(b"Rar!")
    with pytest.raises(RearError, match=r"is neither a \.zip nor a \.tar file"):
        open_source("archive", str(other), "")
    with pytest.raises(RearError, match=r"holds no \.zip files of the split 'val'"):
        open_source("archive", str(tmp_path), "val")


def test_cut_archives_are_one_line(tmp_path: Path):
    for kind, write in WRITE.items():
        file = write(tmp_path / f"a.{kind}", images("ant/0.png", "bee/0.png"))
        whole = file.read_bytes()
        for length in (0, 20, 700, len(whole) - 30 if kind == "zip" else 1000):
            file.write_bytes(whole[:length])
            with pytest.raises(RearError, match=rf"a\.{kind} is (no whole|damaged or cut off)") as raised:
                open_source("archive", str(file), "", TOLERANT)
            assert "\n" not in str(raised.value)
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(b"x" * 999))
    with pytest.raises(RearError, match=r"b\.tar\.gz is compressed.*gzip -d"):
        open_source("archive", str(tmp_path / "b.tar.gz"), "")


def test_a_spoilt_member_is_replaced_by_the_next(tmp_path: Path, caplog):
    file = write_zip(tmp_path / "a.zip", images("ant/0.png", "bee/0.png", "cat/0.png"), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("bee/0.png").header_offset
    for place in (start, start + 60):  # its header, its bytes
        whole = bytearray(file.read_bytes())
        whole[place] ^= 255
        spoilt = tmp_path / f"{place}.zip"
        spoilt.write_bytes(whole)
        assert open_source("archive", str(spoilt), "", TOLERANT)[1][1] == 2
        assert "is damaged" in caplog.records[-1].getMessage()
        assert "\n" not in caplog.records[-1].getMessage()


def test_bombs_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A member that says that it is large is left out; one that lies is unpacked no further than it says."""
    bomb = b"\0" * 10**6
    file = write_zip(tmp_path / "a.zip", {"ant/0.png": bomb, **images("bee/0.png")}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zip_members, "LARGEST", 10**5)
    with pytest.raises(RearError, match=r"ant/0\.png: it unpacks to 1000000 bytes; 100000 are the most"):
        open_source("archive", str(file), "")
    assert open_source("archive", str(file), "", TOLERANT).class_names == ("bee",)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("ant/0.png")
    lie = zip_members.Packed(info.header_offset, info.compress_size, 1000, info.compress_type, info.CRC)
    tracemalloc.start()
    with pytest.raises(RearError, match="its bytes are not those that were packed"):
        zip_members.read_packed(file, lie)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10**5


@pytest.mark.parametrize(
    ("flag", "method", "message"), [(1, 0, "it is encrypted"), (0, 12, "it is packed by method 12; pack it by `zip`")]
)
def test_members_that_cannot_be_read_are_broken(flag: int, method: int, message: str, tmp_path: Path):
    file = spoil_first(write_zip(tmp_path / "a.zip", images("ant/0.png", "bee/0.png")), flag, method)
    with pytest.raises(RearError, match=message):
        open_source("archive", str(file), "")
    assert open_source("archive", str(file), "", TOLERANT).class_names == ("bee",)


@pytest.mark.parametrize("around", ["", "photos/"])
def test_broken_members_count_for_the_split_that_holds_them(around: str, tmp_path: Path, caplog):
    names = [f"{around}{name}" for name in ("test/ant/0.png", "test/ant/1.png", "train/ant/0.png", "train/bee/0.png")]
    file = spoil_first(write_zip(tmp_path / "a.zip", images(*names)))
    assert len(open_source("archive", str(file), "train")) == 2
    assert caplog.text.count("broken") == 0
    with pytest.raises(RearError, match=r"test/ant/0\.png: it is encrypted.*1 of 2 are broken"):
        open_source("archive", str(file), "test")
    assert len(open_source("archive", str(file), "test", TOLERANT)) == 1


@pytest.mark.parametrize("kind", WRITE)
def test_what_is_left_out_counts_for_the_split_that_holds_it(kind: str, tmp_path: Path, caplog):
    others = ("photos/test/notes.txt", "photos/test/ant/more/1.png", "photos/test/ant/2.doc", "readme.txt")
    names = ("photos/train/ant/0.png", "photos/test/ant/0.png")
    archive = WRITE[kind](tmp_path / f"a.{kind}", images(*names) | dict.fromkeys(others, b"x"))
    assert len(open_source("archive", str(archive), "train")) == 1
    assert "left out" not in caplog.text
    assert len(open_source("archive", str(archive), "test")) == 1
    assert "left out 3 files or folders" in caplog.text


def test_index_is_kept_and_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, build = [], archives._index
    monkeypatch.setattr(archives, "_index", lambda *arguments: made.append(1) or build(*arguments))
    file = write_zip(tmp_path / "a.zip", images("train/ant/0.png", "test/ant/1.png"))
    for split in ("train", "train", "test", "test"):
        open_source("archive", str(file), split, SourceSettings(class_names=("ant",)))
    assert len(made) == 2
    before = open_source("archive", str(file), "train").contents
    write_zip(file, images("train/ant/0.png", "train/bee/0.png"))
    source = open_source("archive", str(file), "train")
    assert (len(made), source.class_names) == (3, ("ant", "bee"))
    assert source.contents != before
