"""Places in buckets, with a bucket in memory; `test_buckets.py` has a server and whole jobs."""

import builtins
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.array_files import read_npy
from rear_jax.runtime.atomic import atomic_file, read_json, write_json
from rear_jax.runtime.files import open_regular
from rear_jax.sampling import uploaded_set
from rear_jax.sampling.sampled_set import SampledSet
from rear_jax.sampling.uploaded_set import UploadedSet, open_set
from tests.toy_bucket import NAME, Bucket


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The files of a bucket at gs://toys, with caches and scratch of this test."""
    files = Bucket()
    monkeypatch.setattr(places, "_files", lambda: files)
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: files)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(places, "_start_uploading", lambda: None)
    monkeypatch.setattr(places, "_growing", {})
    monkeypatch.setitem(places._limit, "bytes", 10**9)
    places._own.cache_clear()
    places._scratch_of_process.cache_clear()
    yield files
    places._own.cache_clear()
    places._scratch_of_process.cache_clear()


@pytest.fixture
def run(bucket):
    return places.place(f"{NAME}/run")


def fail_while_writing(context) -> None:
    with context as path:
        path.write_text("half")
        raise ZeroDivisionError


def scratch_left(tmp_path) -> list[Path]:
    return [file for file in tmp_path.rglob("*") if file.is_file() and "scratch" in file.parts]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("s3://bucket/run", "orbax keeps no checkpoints at s3://: mount the bucket"),
        ("az://bucket/run", "az:// is not read or written: give a folder of this machine or gs://BUCKET"),
        ("file:///run", "file:// is not read or written"),
        ("gs://", "names no bucket: give gs://BUCKET/FOLDER"),
        ("gs:///run", "names no bucket"),
        ("gs://B!/run", "names no bucket"),
    ],
)
def test_other_schemes_and_no_bucket_are_refused_by_name(bucket, given, said):
    with pytest.raises(RearError, match=said):
        places.place(given)


def test_a_local_place_is_a_path_as_before(tmp_path, monkeypatch):
    assert type(places.place("a/../b")) is type(Path())
    assert str(places.place("a/../b")) == str(Path("a/../b"))
    assert places.local(tmp_path) is tmp_path
    assert places.appended(tmp_path / "log.txt") == tmp_path / "log.txt"
    with places.staged(tmp_path / "folder") as folder:
        assert folder == tmp_path / "folder"
    assert not places.is_bucket(tmp_path)
    assert not places.is_mounted_bucket(tmp_path)


def test_without_the_packages_one_line_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def without(name, *arguments):
        if name == "gcsfs":
            raise ModuleNotFoundError("No module named 'gcsfs'", name="gcsfs")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RearError, match=r"'gcsfs' is not installed: pip install 'rear-jax\[gcs\]'"):
        places.place("gs://bucket/run")


def test_a_place_in_a_bucket_stays_one(run):
    for place in (run / "codes", run.parent, run.resolve(), (run / "a").with_name("b"), run / "codes" / "x.npz"):
        assert places.is_bucket(place)
        assert str(place).startswith(f"{NAME}")
    run.mkdir(parents=True, exist_ok=True)
    assert not run.exists()
    for mode in ("a", "ab", "r+b"):
        with pytest.raises(ValueError, match="nothing is added to an object"):
            (run / "log.txt").open(mode)


def test_a_file_appears_when_all_of_it_is_written(run, tmp_path):
    write_json(run / "a.json", {"a": 1})
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(atomic_file(run / "a.json"))
    assert read_json(run / "a.json") == {"a": 1}
    assert [entry.name for entry in run.iterdir()] == ["a.json"]
    assert scratch_left(tmp_path) == []


def test_objects_are_fetched_once_and_again_when_they_are_replaced(bucket, run):
    for value in (1, 2):
        with atomic_file(run / "a.npy") as temporary, temporary.open("wb") as file:
            np.save(file, np.full(3, value))
        for _ in range(2):
            assert read_npy(run / "a.npy", "mend it").tolist() == [value] * 3
    assert bucket.fetched == [f"{NAME}/run/a.npy"] * 2
    with pytest.raises(RearError, match="there is none"):
        open_regular(run / "b.npy", "there is none")
    with pytest.raises(RearError, match="there is none"):
        open_regular(run, "there is none")


def test_what_was_not_asked_for_longest_makes_room(bucket, run):
    places.limit_cache(25e-9)
    names = [run / name for name in "abc"]
    for name in names:
        name.write_bytes(b"x" * 10)
    first, second = (places.local(name) for name in names[:2])
    os.utime(first, (1, 1))
    os.utime(second, (2, 2))
    assert places.local(names[0]) == first  # asked for again
    third = places.local(names[2])
    assert [file.exists() for file in (first, second, third)] == [True, False, True]
    (run / "large").write_bytes(b"x" * 100)
    assert places.local(run / "large").read_bytes() == b"x" * 100
    assert not first.exists()


def test_a_folder_is_uploaded_whole_and_only_what_differs(bucket, run):
    for content, uploaded in (("1", ["a", "sub/b"]), ("2", ["sub/b"])):
        bucket.uploaded.clear()
        with places.staged(run / "set") as folder:
            (folder / "sub").mkdir(parents=True)
            (folder / "a").write_text("always")
            (folder / "sub" / "b").write_text(content)
            if content == "1":
                (folder / "c").write_text("once")
        there = sorted(name.removeprefix("toys/run/set/") for name in bucket.find(str(run / "set"), detail=True))
        assert there == (["a", "c", "sub/b"] if content == "1" else ["a", "sub/b"])
        assert sorted(name.rpartition("set/")[2] for name in bucket.uploaded if not name.endswith("c")) == uploaded
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(places.staged(run / "set"))
    assert (run / "set" / "a").read_text() == "always"


def test_lines_are_added_in_scratch_and_uploaded(run):
    (run / "log.txt").write_text("before\n")
    copy = places.appended(run / "log.txt")
    with copy.open("a") as file:
        file.write("after\n")
    assert (run / "log.txt").read_text() == "before\n"
    places.upload_appended()
    assert (run / "log.txt").read_text() == "before\nafter\n"
    assert places.appended(run / "log.txt") == copy
    places.finish_appended(copy)
    (run / "log.txt").write_text("another process\n")
    assert places.appended(run / "log.txt").read_text() == "another process\n"


def test_scratch_of_processes_that_have_ended_is_removed(bucket, tmp_path):
    left = places._own("scratch") / "left"
    left.mkdir()
    (left / "images.npy").touch()
    mine = places.scratch(places.place(f"{NAME}/run"))
    assert not left.exists()
    places._scratch_of_process.cache_clear()
    places.scratch(places.place(f"{NAME}/run"))
    assert mine.exists()


@pytest.mark.parametrize(
    ("mounts", "mounted"),
    [
        ("disk / ext4 rw 0 0\nbucket {0} fuse.gcsfuse rw 0 0\n", True),
        ("bucket / fuse.gcsfuse rw 0 0\ndisk {0} ext4 rw 0 0\n", False),
        ("disk / ext4 rw 0 0\nbucket {0}x fuse.gcsfuse rw 0 0\n", False),
    ],
)
def test_a_bucket_that_gcsfuse_has_mounted_is_known(tmp_path, monkeypatch, mounts, mounted):
    read = Path.read_text
    text = mounts.format(tmp_path)
    monkeypatch.setattr(Path, "read_text", lambda self: text if str(self) == "/proc/self/mounts" else read(self))
    assert places.is_mounted_bucket(tmp_path / "run" / "samples.partial") is mounted
    kind = UploadedSet if mounted else SampledSet
    assert type(open_set(tmp_path / "run", {}, (2, 1, 1, 3), write=True)) is kind


@pytest.mark.parametrize("remote", [True, False])
def test_parts_of_a_set_are_used_again(run, tmp_path, monkeypatch, remote):
    monkeypatch.setattr(uploaded_set, "PART_SECONDS", -1.0)
    folder = run / "samples.partial" if remote else tmp_path / "mounted" / "samples.partial"
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), dtype=np.uint8)
    first = UploadedSet(folder, {"seed": 0}, images.shape, write=True)
    first.add(np.array([4, 1]), images[[4, 1]])
    monkeypatch.setattr(uploaded_set, "PART_SECONDS", 1e6)
    first.add(np.array([0]), images[[0]])  # lost, unless it is kept

    again = UploadedSet(folder, {"seed": 0}, images.shape, write=True)
    assert np.flatnonzero(again.done).tolist() == [1, 4]
    assert np.array_equal(again.images[[1, 4]], images[[1, 4]])
    again.add(np.array([5, 0]), images[[5, 0]])
    again.keep()
    again.keep()  # nothing is new
    with atomic_file(folder / "images-000002.npy") as torn:  # its numbers were not written
        torn.write_bytes(b"")
    assert np.flatnonzero(UploadedSet(folder, {"seed": 0}, images.shape, write=False).done).tolist() == [0, 1, 4, 5]

    last = UploadedSet(folder, {"seed": 0}, images.shape, write=True)
    last.add(np.array([2, 3]), images[[2, 3]])
    assert np.array_equal(last.images, images)
    last.export(folder.parent / "samples.npz", np.arange(6))
    assert np.array_equal(np.load(places.local(folder.parent / "samples.npz"))["arr_0"], images)
    last.remove()
    assert not folder.exists()
    assert not UploadedSet(folder, {"seed": 1}, images.shape, write=True).done.any()
