"""Sources of images with captions: what holds for every form of one set, and broken pairs."""

import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rear_jax.config import default
from rear_jax.data.batches import image_batches, ordered_batches
from rear_jax.data.sources import fingerprint, open_source, open_split, require_classes, split_facts
from rear_jax.data.sources.interface import SourceSettings, captioned
from rear_jax.errors import RearError
from tests.toy_pairs import (
    ALL,
    CAPTIONS,
    KINDS,
    check_pairs,
    encoded,
    picture,
    records,
    write_images,
    write_jsonl,
    write_kind,
    write_tar,
)

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
