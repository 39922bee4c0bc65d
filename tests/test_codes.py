"""Code files: what is written comes back, a broken folder is refused by name, the order obeys the step number."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from rear_jax.data.batches import code_batches
from rear_jax.data.codes import WRITER_OPTIONS, open_codes, write_codes, write_shard
from rear_jax.data.codes_header import CodesHeader, check_codes
from rear_jax.errors import RearError

HEADER = CodesHeader(
    num_images=11,
    num_augmentations=2,
    augmentation="flip",
    codes_per_image=4,
    codebook_size=500,
    image_size=32,
    num_classes=5,
    fingerprint="abc",
    source="fashion_mnist",
    split="train",
    num_shards=3,
)


def encode(start: int, stop: int):
    """Codes that say which record they are: record r has codes (r, r + 100, r + 200, r + 300)."""
    records = np.arange(2 * start, 2 * stop)
    return records[:, None] + np.arange(0, 400, 100), records // 2 % 5, records % 2


def write(directory: Path, header: CodesHeader = HEADER, encode_range=encode, **processes) -> list[tuple[int, int]]:
    calls: list[tuple[int, int]] = []
    write_codes(directory, header, encode_range, progress=lambda *done: calls.append(done), **processes)
    return calls


def refuse(start: int, stop: int):
    raise AssertionError(f"images {start} to {stop} were encoded again")


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


@pytest.mark.parametrize("num_classes", [2**16, 2**16 + 1, 2**24 + 5])
def test_labels_may_be_numbers_of_captions(tmp_path: Path, num_classes: int):
    """More of them than a uint16 counts."""
    header = dataclasses.replace(HEADER, num_classes=num_classes)
    labels = np.linspace(0, num_classes - 1, 22).astype(int)

    def numbered(start: int, stop: int):
        codes, _, views = encode(start, stop)
        return codes, labels[2 * start : 2 * stop], views

    write(tmp_path, header, numbered)
    for in_memory in (False, True):
        codes = open_codes(tmp_path, in_memory=in_memory)
        read = codes.read(np.arange(22)[::-1])
        np.testing.assert_array_equal(read["label"], labels[::-1])
        np.testing.assert_array_equal(read["codes"], encode(0, 11)[0][::-1])
        np.testing.assert_array_equal(read["augmentation"], np.arange(22)[::-1] % 2)
    assert codes.class_counts()[labels].tolist() == [1] * 22


def test_a_wide_label_out_of_range_is_damage(tmp_path: Path):
    header = dataclasses.replace(HEADER, num_classes=2**16 + 2, num_shards=1)
    write(tmp_path, header)
    wide = dataclasses.replace(header, num_classes=2**17 + 2)
    codes, labels, views = encode(0, 11)
    write_shard(wide.shard_path(tmp_path, 0), wide, codes, labels + 2**17 - 4, views)
    with pytest.raises(RearError, match="out of range"):
        open_codes(tmp_path, in_memory=True)


@pytest.mark.parametrize("in_memory", [False, True])
def test_round_trip(tmp_path: Path, in_memory: bool):
    assert write(tmp_path) == [(3, 11), (7, 11), (11, 11)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *(f"codes-0000{shard}-of-00003.array_record" for shard in range(3)),
        "header.json",
    ]
    codes = open_codes(tmp_path, in_memory=in_memory)
    assert codes.header == HEADER
    assert len(codes) == 22
    indices = np.array([21, 0, 7, 7, 13])
    read = codes.read(indices)
    np.testing.assert_array_equal(read["codes"], indices[:, None] + np.arange(0, 400, 100))
    np.testing.assert_array_equal(read["label"], indices // 2 % 5)
    np.testing.assert_array_equal(read["augmentation"], indices % 2)
    assert {array.dtype for array in read.values()} == {np.dtype(np.int32)}


def test_codes_of_a_source_without_splits_are_read_again(tmp_path: Path):
    header = dataclasses.replace(HEADER, split="")
    write(tmp_path, header)
    assert open_codes(tmp_path).header == header


def test_header_file_tells_other_readers_all(tmp_path: Path):
    write(tmp_path)
    content = json.loads((tmp_path / "header.json").read_text())
    assert content["format_version"] == 1
    assert content["num_records"] == 22
    assert content["shard_sizes"] == [6, 8, 8]
    assert content["fingerprint"] == "abc"


@given(images=st.integers(1, 500), shards=st.integers(1, 500), views=st.integers(1, 10))
def test_shards_cover_the_images_once(images: int, shards: int, views: int):
    shards = min(images, shards)
    header = dataclasses.replace(HEADER, num_images=images, num_shards=shards, num_augmentations=views)
    covered = [image for start, stop in header.image_ranges for image in range(start, stop)]
    assert covered == list(range(images))
    assert sum(header.shard_sizes) == header.num_records
    assert min(header.shard_sizes) > 0


def test_a_killed_run_is_continued(tmp_path: Path):
    def killed(start: int, stop: int):
        if start == 3:
            raise KeyboardInterrupt
        return encode(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, encode_range=killed)
    (tmp_path / "codes-00001-of-00003.array_record.tmp0").write_bytes(b"cut off in the middle")
    with pytest.raises(RearError, match="not finished"):
        open_codes(tmp_path)
    encoded = []
    write(tmp_path, encode_range=lambda start, stop: encoded.append((start, stop)) or encode(start, stop))
    assert encoded == [(3, 7), (7, 11)]
    assert not list(tmp_path.glob("*.tmp*"))
    np.testing.assert_array_equal(open_codes(tmp_path).read(np.arange(22))["codes"][:, 0], np.arange(22))


def test_a_finished_folder_is_left_alone(tmp_path: Path):
    write(tmp_path)
    assert write(tmp_path, encode_range=refuse)[-1] == (11, 11)


def test_processes_share_the_shards(tmp_path: Path):
    assert write(tmp_path, process_index=1, process_count=2) == [(4, 4)]
    with pytest.raises(RearError, match="not finished"):
        open_codes(tmp_path)
    assert write(tmp_path, process_index=0, process_count=2) == [(3, 7), (7, 7)]
    assert len(open_codes(tmp_path)) == 22


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_is_refused(tmp_path: Path, finished: bool):
    write(tmp_path)
    if not finished:
        (tmp_path / "header.json").rename(tmp_path / "header.json.partial")
    with pytest.raises(RearError, match="begun with fingerprint 'abc', not 'xyz'"):
        write(tmp_path, dataclasses.replace(HEADER, fingerprint="xyz"))


def test_shards_without_a_header_are_refused(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "header.json").unlink()
    with pytest.raises(RearError, match="without a header"):
        write(tmp_path)


def test_out_of_range_is_refused_on_writing(tmp_path: Path):
    path = tmp_path / "shard"
    codes, labels, views = encode(0, 3)
    bad_codes, bad_labels = codes.copy(), labels.copy()
    bad_codes[2, 1], bad_labels[4] = 500, -1
    with pytest.raises(RearError, match=r"a code is outside \[0, 500\)"):
        write_shard(path, HEADER, bad_codes, labels, views)
    with pytest.raises(RearError, match=r"a label is outside \[0, 5\)"):
        write_shard(path, HEADER, codes, bad_labels, views)
    with pytest.raises(RearError, match="views do not run 0 to 1"):
        write_shard(path, HEADER, codes, labels, views[::-1])
    with pytest.raises(RearError, match="wanted"):
        write_shard(path, HEADER, codes[:, :3], labels, views)
    with pytest.raises(RearError, match="gave 4 rows"):
        write(tmp_path, encode_range=lambda start, stop: encode(start, start + 2))
    assert not path.exists()


@pytest.mark.parametrize(
    "change", [{"num_images": 0}, {"codebook_size": 2**16 + 1}, {"num_classes": 2**32 + 1}, {"num_shards": 12}]
)
def test_a_plan_that_the_format_cannot_hold_is_refused(change: dict[str, int]):
    with pytest.raises(RearError, match="codes header"):
        dataclasses.replace(HEADER, **change)


@pytest.mark.parametrize("keep", [0, 1000, 70_000])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int):
    write(tmp_path, dataclasses.replace(HEADER, num_images=600, num_shards=1), encode_range=large)
    shard = tmp_path / "codes-00000-of-00001.array_record"
    assert shard.stat().st_size > 70_000
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(RearError, match=r"codes-00000-of-00001.array_record is damaged: 0 records"):
        open_codes(tmp_path)
    write(tmp_path, dataclasses.replace(HEADER, num_images=600, num_shards=1), encode_range=large)
    assert len(open_codes(tmp_path)) == 1200


def large(start: int, stop: int):
    records = np.arange(2 * start, 2 * stop)
    return (records % 500)[:, None] + np.zeros((1, 4), int), records * 0, records % 2


def test_a_missing_shard_is_named_and_restored(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "codes-00001-of-00003.array_record").unlink()
    with pytest.raises(RearError, match=r"codes-00001-of-00003.array_record is missing"):
        open_codes(tmp_path)
    write(tmp_path)
    assert len(open_codes(tmp_path)) == 22


BAD = {  # what a record of the folder's cannot be
    "short": [1, 0, 1, 2, 3],
    "code": [1, 0, 1, 2, 3, 500],
    "label": [5, 0, 1, 2, 3, 4],
    "view": [1, 2, 1, 2, 3, 4],
}


def damage(path: Path, bad: dict[int, list[int]]) -> None:
    """Writes a shard of eight records again, some of them as they cannot be; the others' codes are their position."""
    writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
    for record in range(8):
        writer.write(np.array(bad.get(record, [1, 0, *[record] * 4]), "<u2").tobytes())
    writer.close()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_corrupt_record_is_named(tmp_path: Path, bad: str, in_memory: bool):
    write(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.array_record", {5: BAD[bad]})
    with pytest.raises(RearError, match=r"codes-00001-of-00003.array_record, record 5: .*; 1 of 22 records"):
        open_codes(tmp_path, in_memory=in_memory).read(np.arange(22))


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_next_readable_record_takes_the_place_of_a_corrupt_one(tmp_path: Path, caplog, in_memory: bool):
    """Across the end of a shard, and from the last record on to the first; each is counted and named once."""
    write(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.array_record", {3: BAD["code"], 6: BAD["short"], 7: BAD["label"]})
    damage(tmp_path / "codes-00002-of-00003.array_record", {7: BAD["view"]})
    codes = open_codes(tmp_path, in_memory=in_memory, max_corrupt_share=4 / 22)
    for _ in range(2):
        read = codes.read(np.array([21, 0, 9, 13, 12, 5]))["codes"][:, 0]
        np.testing.assert_array_equal(read, [0, 0, 4, 0, 0, 5])
    assert codes.num_corrupt == 4
    for shard, record in ((1, 3), (1, 6), (1, 7), (2, 7)):
        assert caplog.text.count(f"codes-0000{shard}-of-00003.array_record, record {record}: ") == 1
    with pytest.raises(RearError, match=r"4 of 22 records cannot be read so far, codes.max_corrupt_share = 0.18"):
        open_codes(tmp_path, in_memory=in_memory, max_corrupt_share=0.18).read(np.arange(22))


def test_batches_with_corrupt_records_repeat_themselves(tmp_path: Path):
    """From any step on, for any number of processes."""
    write(tmp_path)
    damage(tmp_path / "codes-00001-of-00003.array_record", {2: BAD["code"], 5: BAD["short"]})
    whole, shares = [], []
    for start, process, count in ((0, 0, 1), (4, 0, 2), (4, 1, 2)):
        codes = open_codes(tmp_path, max_corrupt_share=0.1)
        options = {"start_step": start, "process_index": process, "process_count": count}
        (shares if start else whole).append(take(code_batches(codes, batch_size=6, seed=1, **options), 8 - start))
    for step in range(4):
        joined = np.concatenate([share[step]["codes"] for share in shares])
        np.testing.assert_array_equal(joined, whole[0][4 + step]["codes"])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(tmp_path: Path, share: float):
    with pytest.raises(RearError, match=f"max_corrupt_share = {share}: choose a share from 0 to below 1"):
        open_codes(tmp_path, max_corrupt_share=share)


def flip(shard: Path, start: int, count: int) -> None:
    """Overwrites bytes of a file."""
    content = bytearray(shard.read_bytes())
    content[start : start + count] = bytes(byte ^ 0xFF for byte in content[start : start + count])
    shard.write_bytes(content)


@pytest.mark.parametrize("in_memory", [False, True])
def test_flipped_bits_are_found(tmp_path: Path, in_memory: bool):
    """In a real file, wherever they are: what is read besides is what was written."""
    header = dataclasses.replace(HEADER, num_images=600, num_shards=1)
    shard = tmp_path / "codes-00000-of-00001.array_record"
    write(tmp_path, header, encode_range=large)
    written, rng = shard.read_bytes(), np.random.default_rng(0)
    for start in rng.integers(1_000, 60_000, 8).tolist():
        shard.write_bytes(written)
        flip(shard, start, 200)
        codes = open_codes(tmp_path, in_memory=in_memory, max_corrupt_share=0.01)
        read = codes.read(np.arange(1200))
        assert 1 <= codes.num_corrupt <= 12
        assert (read["codes"] != large(0, 600)[0]).any(axis=1).sum() == codes.num_corrupt
        with pytest.raises(RearError, match=r"array_record, record \d+: .*1 of 1200 records cannot be read"):
            open_codes(tmp_path, in_memory=in_memory).read(np.arange(1200))


def test_a_place_that_is_not_kept_is_refused():
    with pytest.raises(RearError, match="orbax keeps no checkpoints at s3://"):
        open_codes(epath.Path("s3://bucket/codes"))
    with pytest.raises(RearError, match="orbax keeps no checkpoints at s3://"):
        write(epath.Path("s3://bucket/codes"), encode_range=refuse)


def test_a_damaged_or_foreign_header_is_refused(tmp_path: Path):
    write(tmp_path)
    header = tmp_path / "header.json"
    content = json.loads(header.read_text())
    header.write_text(json.dumps({**content, "format_version": 2}))
    with pytest.raises(RearError, match="not of format version 1"):
        open_codes(tmp_path)
    header.write_text(header.read_text()[:50])
    with pytest.raises(RearError, match="damaged"):
        open_codes(tmp_path)
    header.unlink()
    with pytest.raises(RearError, match="holds no codes"):
        open_codes(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("fingerprint", "xyz"), ("codebook_size", 7), ("codes_per_image", 9), ("num_classes", 6)]
)
def test_check_codes_names_both_values(name: str, value: int | str):
    fits = {"fingerprint": "abc", "codebook_size": 500, "codes_per_image": 4, "num_classes": 5}
    check_codes(HEADER, **fits)
    with pytest.raises(RearError, match=f"{name} {fits[name]!r}, this run has {value!r}"):
        check_codes(HEADER, **{**fits, name: value})


@pytest.mark.parametrize("length", [32, 64, 128, 273])  # of TiTok's and AliTok's sequences
def test_codes_of_a_sequence_go_in_and_out_and_fit_no_other_length(tmp_path: Path, length: int):
    header = dataclasses.replace(
        HEADER, num_images=3, num_augmentations=1, codes_per_image=length, codebook_size=4096, num_shards=1
    )
    codes = np.random.default_rng(0).integers(4096, size=(3, length))
    write_codes(tmp_path, header, lambda *_: (codes, np.arange(3), np.zeros(3, np.int64)), progress=lambda *_: None)
    opened = open_codes(tmp_path)
    np.testing.assert_array_equal(opened.read(np.arange(3))["codes"], codes)
    fits = {"fingerprint": "abc", "codebook_size": 4096, "num_classes": 5}
    check_codes(opened.header, codes_per_image=length, **fits)
    for other in {32, 64, 128, 256, 273} - {length}:
        with pytest.raises(RearError, match=f"codes_per_image {length}, this run has {other}"):
            check_codes(opened.header, codes_per_image=other, **fits)


def test_every_epoch_visits_every_record_in_another_order(tmp_path: Path):
    write(tmp_path)
    batches = take(code_batches(open_codes(tmp_path), batch_size=11, seed=3), 4)
    first = np.concatenate([batch["codes"][:, 0] for batch in batches[:2]])
    second = np.concatenate([batch["codes"][:, 0] for batch in batches[2:]])
    np.testing.assert_array_equal(np.sort(first), np.arange(22))
    np.testing.assert_array_equal(np.sort(second), np.arange(22))
    assert (first != second).any()
    np.testing.assert_array_equal(batches[0]["label"], batches[0]["codes"][:, 0] // 2 % 5)
    assert batches[0].keys() == {"codes", "label"}
    other_seed = take(code_batches(open_codes(tmp_path), batch_size=22, seed=4), 1)[0]
    assert (other_seed["codes"][:, 0] != first).any()


def test_fewer_images_are_read_evenly_spread_and_in_all_views(tmp_path: Path):
    """Three of eleven images: 0, 3 and 7, with records 2 i and 2 i + 1; each epoch visits all six."""
    write(tmp_path)
    batches = take(code_batches(open_codes(tmp_path), batch_size=6, seed=3, num_images=3), 3)
    for batch in batches:
        assert sorted(batch["codes"][:, 0]) == [0, 1, 6, 7, 14, 15]
    assert any((batch["codes"][:, 0] != batches[0]["codes"][:, 0]).any() for batch in batches[1:])
    whole = take(code_batches(open_codes(tmp_path), batch_size=6, seed=3), 3)
    more = take(code_batches(open_codes(tmp_path), batch_size=6, seed=3, num_images=99), 3)
    np.testing.assert_array_equal([b["codes"] for b in more], [b["codes"] for b in whole])


@pytest.mark.parametrize("batch_size", [6, 60])  # 60 rows span several epochs of 22
@pytest.mark.parametrize("process_count", [1, 2, 3])
@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_depend_on_the_step_alone(tmp_path: Path, batch_size: int, process_count: int, in_memory: bool):
    write(tmp_path)
    whole = take(code_batches(open_codes(tmp_path), batch_size=batch_size, seed=1), 9)
    codes = open_codes(tmp_path, in_memory=in_memory)
    shares = [
        take(
            code_batches(
                codes,
                batch_size=batch_size,
                seed=1,
                start_step=5,
                process_index=process,
                process_count=process_count,
            ),
            4,
        )
        for process in range(process_count)
    ]
    for step in range(4):
        for key in ("codes", "label"):
            joined = np.concatenate([share[step][key] for share in shares])
            np.testing.assert_array_equal(joined, whole[5 + step][key])


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(RearError, match="batch_size 7 does not divide among 2 processes"):
        code_batches(open_codes(tmp_path), batch_size=7, seed=0, process_count=2)
