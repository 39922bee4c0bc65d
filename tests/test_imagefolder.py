"""Images with captions in a table of metadata beside them."""

from pathlib import Path

import numpy as np
import pytest

from rear_jax.data.sources import open_source
from rear_jax.data.sources.interface import SourceSettings, captioned
from rear_jax.errors import RearError
from tests.toy_pairs import TOLERANT, picture, write_csv, write_images, write_jsonl, write_kind


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


# --- classes


def test_classes_may_be_numbers_or_names(tmp_path: Path):
    names = write_images(tmp_path, 4)
    for labels, found, class_names in (
        ((3, 0, 1, 1), [3, 0, 1, 1], ()),
        (("3", "0", "1", "1"), [3, 0, 1, 1], ()),
        (("b", "a", "b", "c"), [1, 0, 1, 2], ("a", "b", "c")),
        (("b", 7, "07", "b"), [2, 1, 0, 2], ("07", "7", "b")),
    ):
        write_jsonl(tmp_path, [{"file_name": n, "label": label} for n, label in zip(names, labels, strict=True)])
        source = open_source("imagefolder", str(tmp_path), "")
        assert ([source[index][1] for index in range(4)], source.class_names) == (found, class_names)
        assert source.num_classes == max(found) + 1


def test_numbers_beside_names_are_names(tmp_path: Path):
    """A held-out split may have those classes alone that look like numbers."""
    for split, labels in (("train", ("cat", "1", 0)), ("test", (1, "1", 0))):
        names = write_images(tmp_path / split, 3)
        rows = [{"file_name": name, "label": label} for name, label in zip(names, labels, strict=True)]
        write_jsonl(tmp_path / split, rows)
    train = open_source("imagefolder", str(tmp_path), "train")
    assert (train.class_names, [train[index][1] for index in range(3)]) == (("0", "1", "cat"), [2, 1, 0])
    test = open_source("imagefolder", str(tmp_path), "test", SourceSettings(class_names=("a", "0", "1", "cat")))
    assert [test[index][1] for index in range(3)] == [2, 2, 1]


def test_rows_without_a_class_are_broken(tmp_path: Path):
    names = write_images(tmp_path, 6)
    labels = [{"label": "ant"}, {}, {"label": None}, {"label": [1]}, {"label": "bee"}, {"label": "ant"}]
    write_jsonl(tmp_path, [{"file_name": name, **label} for name, label in zip(names, labels, strict=True)])
    with pytest.raises(RearError, match=r"config\.data\.label_key = 'label' is none of its keys file_name.*3 of 6"):
        open_source("imagefolder", str(tmp_path), "")
    source = open_source("imagefolder", str(tmp_path), "", TOLERANT)
    assert [source[index][1] for index in range(3)] == [0, 1, 0]
    np.testing.assert_array_equal(source[1][0], picture(4))


def test_captions_come_before_classes_unless_they_are_not_wanted(tmp_path: Path):
    (name,) = write_images(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": name, "text": "a fox", "kind": "fox"}])
    assert captioned(open_source("imagefolder", str(tmp_path), ""))
    source = open_source("imagefolder", str(tmp_path), "", SourceSettings(caption_key="", label_key="kind"))
    assert (captioned(source), source.class_names) == (False, ("fox",))
    other = open_source("imagefolder", str(tmp_path), "", SourceSettings(caption_key="", label_key="text"))
    assert other.contents != source.contents


def test_metadata_of_classes_that_changes_is_noticed(tmp_path: Path):
    (name,) = write_images(tmp_path, 1)
    write_jsonl(tmp_path, [{"file_name": name, "label": 0}])
    source = open_source("imagefolder", str(tmp_path), "")
    (tmp_path / "metadata.jsonl").write_text("{}\n" * 50)
    with pytest.raises(RearError, match="can no longer be read"):
        source[0]
