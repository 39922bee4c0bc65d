"""Damaged files of images, labels and codes: one line that says so, or the right result; never a traceback."""

import io
import itertools
import json
import resource
import shutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rear_jax.data.codes import open_codes, write_codes
from rear_jax.data.codes_header import HEADER, CodesHeader, as_json
from rear_jax.data.imports import Limits, open_import
from rear_jax.data.sources import captioned, open_source
from rear_jax.data.sources.decoding import decode
from rear_jax.data.sources.interface import SourceSettings
from rear_jax.data.sources.kept_index import kept_index
from rear_jax.errors import RearError
from rear_jax.evaluation.samples import open_samples
from rear_jax.sampling.sampled_set import SampledSet

TOLERANT = SourceSettings(max_broken_share=0.9)
LIMITS = Limits(codes_per_image=4, codebook_size=16, num_classes=10)
CODES = CodesHeader(6, 1, "center", 4, 16, 32, 10, "f00", "set", "train", 2)
NUMBERS = (b"0", b"-1", b"1e999", b"nan", b"99999999999999999999", b"true", b'"7"', b"null", b"[]", b"3.0")
NESTED = b"[" * 100_000  # JSON that takes a parser's stack


def picture(index: int = 0) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (9, 8, 3), np.uint8)


def encoded(kind: str, index: int = 0, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(index)).save(stream, kind, **options)
    return stream.getvalue()


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """A valid file with flipped bits, cut, with a piece moved or repeated, or with another number in it."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        places = st.integers(0, len(data) - 1)
        start, stop = sorted((draw(places), draw(places)))
        match draw(st.sampled_from(("flip", "flip", "cut", "splice", "number", "fill"))):
            case "flip":
                data[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[start : len(data) if draw(st.booleans()) else stop]
            case "splice":
                data[start:start] = data[start:stop]
            case "number":
                data[start:stop] = draw(st.sampled_from(NUMBERS))
            case "fill":
                data[start : start + 8] = draw(st.sampled_from((b"\xff", b"\0", b"\x7f"))) * 8
        data = data or bytearray(b"\n")
    return bytes(data)


def one_line_or_right(read: Callable[[], None]) -> None:
    """Runs it; the only error that it may raise is one line for the user."""
    said = ""
    try:
        read()
    except RearError as error:
        said = str(error)
    assert said.isprintable(), said


def try_source(kind: str, path: Path) -> None:
    """Opens a source of six images that may be broken, and reads all that it has."""

    def read():
        source = open_source(kind, str(path), "", TOLERANT)
        assert 0 < len(source) <= 100
        for index in range(len(source)):
            image, label = source[index]
            assert image.dtype == np.uint8
            assert image.shape[2] == 3
            assert 0 <= label < source.num_classes
            if captioned(source):
                assert source.caption(label).strip()
        assert int(source.contents, 16) >= 0

    one_line_or_right(read)


PICTURES = {
    "PNG": encoded("PNG"),
    "JPEG": encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "WEBP": encoded("WEBP"),
    "GIF": encoded("GIF", save_all=True, append_images=[Image.fromarray(picture(1))]),
    "TIFF": encoded("TIFF", compression="tiff_lzw"),
    "BMP": encoded("BMP"),
}


def check_pictures(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(PICTURES)))
    file = data.draw(spoilt(PICTURES[kind]))

    def read():
        image = decode(file, "a\x1b[31m name\nof two lines.png")
        assert image.dtype == np.uint8
        assert image.ndim == 3

    one_line_or_right(read)


def npz_of(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zip_of(method: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for index in range(6):
            archive.writestr(f"é{index % 2}/{index}.png", encoded("PNG", index))
    return stream.getvalue()


def tar_of(suffix: str, texts: list[bytes], *, folder: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for index, text in enumerate(texts):
            for name, content in ((f"é{index}.png", encoded("PNG", index)), (f"é{index}.{suffix}", text)):
                info = tarfile.TarInfo(folder + name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def parquet_of(**columns: list) -> bytes:
    stream = io.BytesIO()
    table = pa.table({"image": [{"bytes": encoded("PNG", i), "path": None} for i in range(6)], **columns})
    pq.write_table(table, stream, row_group_size=2)
    return stream.getvalue()


def jsonl_of(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


RECORDS = [json.dumps({"text": f"a dog {i}"}).encode() for i in range(6)]
SOURCES = {  # kind of source, name of the file that is spoilt -> the whole of it
    ("arrays", "a.npz"): npz_of(
        images=np.stack([picture(i) for i in range(6)]), labels=np.arange(6), num_classes=np.array(10)
    ),
    ("webdataset", "a.tar"): tar_of("json", RECORDS),
    ("webdataset", "b.tar"): tar_of("cls", [b"0", b"1", b"2", b"3", b"4", b"5"]),
    ("parquet", "a.parquet"): parquet_of(text=["a dog"] * 6),
    ("parquet", "b.parquet"): parquet_of(label=list(range(6))),
    ("imagefolder", "metadata.jsonl"): jsonl_of([{"file_name": f"{i}.png", "text": f"a dog {i}"} for i in range(6)]),
    ("webdataset", "c.tar"): tar_of("json", [b'{"label": "ant"}'] * 6),
    ("parquet", "c.parquet"): parquet_of(label=["ant", "bee", "cat"] * 2),
    ("archive", "a.zip"): zip_of(zipfile.ZIP_DEFLATED),
    ("archive", "b.zip"): zip_of(zipfile.ZIP_STORED),
    ("archive", "d.tar"): tar_of("txt", [b""] * 6, folder="é/"),
    ("imagefolder", "metadata.csv"): b"file_name,text\r\n" + b"".join(b'%d.png,"a dog"\r\n' % i for i in range(6)),
}


def check_sources(data: st.DataObject, folder: Path) -> None:
    (kind, name), whole = data.draw(st.sampled_from(sorted(SOURCES.items())))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data.draw(spoilt(whole)))
    if kind == "imagefolder":
        for index in range(6):
            (folder / f"{index}.png").write_bytes(encoded("PNG", index))
        return try_source(kind, folder)
    return try_source(kind, folder / name)


def write_folder_of_codes(folder: Path) -> None:
    def encode(start: int, stop: int):
        codes = np.arange(4 * start, 4 * stop).reshape(-1, 4) % 16
        return codes, np.arange(start, stop), np.zeros(stop - start, int)

    write_codes(folder, CODES, encode, progress=lambda *_: None)


ROWS = jsonl_of([{"class_id": i, "tokens": [i, 1, 2, 3]} for i in range(6)])


def check_codes(data: st.DataObject, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_folder_of_codes(folder)
    spoil = data.draw(st.sampled_from(sorted(file.name for file in folder.iterdir())))
    (folder / spoil).write_bytes(data.draw(spoilt((folder / spoil).read_bytes())))

    def read():
        codes = open_codes(folder, max_corrupt_share=0.9)
        found = codes.read(np.arange(len(codes)))
        assert found["codes"].shape == (6, 4)
        assert found["codes"].max() < 16
        assert found["label"].max() < 10

    one_line_or_right(read)


def check_imports(data: st.DataObject, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    name, whole = data.draw(
        st.sampled_from(
            [("a.jsonl", ROWS), ("a.npz", npz_of(codes=np.arange(24).reshape(6, 4) % 16, labels=np.arange(6)))]
        )
    )
    (folder / name).write_bytes(data.draw(spoilt(whole)))

    def read():
        source = open_import(folder / name, LIMITS)
        codes, labels, _ = source.read(0, source.num_images)
        assert codes.shape == (source.num_images, 4)
        assert labels.max() < 10

    one_line_or_right(read)


def check_samples(data: st.DataObject, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = {
        "samples.npz": npz_of(arr_0=np.stack([picture(i) for i in range(6)]), labels=np.arange(6)),
        "samples.json": json.dumps({"num_images": 6, "seed": 0}).encode(),
    }
    spoil = data.draw(st.sampled_from(sorted(files)))
    for name, whole in files.items():
        (folder / name).write_bytes(data.draw(spoilt(whole)) if name == spoil else whole)

    def read():
        samples = open_samples(folder)
        assert sum(len(batch) for batch in samples.images.batches(4)) == len(samples.images)

    one_line_or_right(read)


CHECKS = {
    "pictures": lambda data, folder: check_pictures(data),
    "sources": check_sources,
    "codes": check_codes,
    "imports": check_imports,
    "samples": check_samples,
}
QUICK = {"pictures": 150, "sources": 60, "codes": 25, "imports": 60, "samples": 40}
counter = itertools.count()


def fuzz(name: str, folder: Path, examples: int) -> None:
    """Many damaged files of one sort, in at most 4 GB of memory more than before."""

    @hypothesis.settings(
        deadline=None, max_examples=examples, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.data())
    def check(data: st.DataObject) -> None:
        CHECKS[name](data, folder / f"{next(counter)}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**22  # kB


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKS)
def test_damage_is_one_line_or_harmless(name: str, tmp_path: Path):
    fuzz(name, tmp_path, QUICK[name])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHECKS)
def test_much_damage_is_one_line_or_harmless(name: str, tmp_path: Path):
    fuzz(name, tmp_path, 2000)


@pytest.mark.parametrize("content", [b"", NESTED, b"[]", b"7", b'{"num_images": null}', b"\xff", b"{" * 50])
def test_json_of_others(content: bytes, tmp_path: Path):
    """Beside samples it says nothing; a header of codes is refused."""
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([picture()] * 3), labels=np.arange(3))
    (tmp_path / "samples.json").write_bytes(content)
    assert "unknown" in open_samples(tmp_path).recipe
    (tmp_path / HEADER).write_bytes(content)
    with pytest.raises(RearError, match=r"header\.json is damaged"):
        open_codes(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_shards": 10**9, "num_images": 10**9},
        {"num_images": 10**18},
        {"codes_per_image": 10**12},
        {"codebook_size": 16.0},
        {"num_images": True},
        {"source": 3},
        {"shard_sizes": 7},
    ],
)
def test_claims_of_a_header_take_no_memory(change: dict, tmp_path: Path):
    (tmp_path / HEADER).write_text(json.dumps(as_json(CODES) | change))
    with pytest.raises(RearError, match=r"header\.json (is damaged|is not of format)") as raised:
        open_codes(tmp_path)
    assert "\n" not in str(raised.value)


def claiming(count: int) -> bytes:
    """The header of a .npy of so many bytes, and none of them."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
    return stream.getvalue()


def zip_of(member: bytes) -> bytes:
    """An .npz whose arrays are all the same."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name in ("images", "codes", "labels"):
            file.writestr(f"{name}.npy", member)
    return stream.getvalue()


def claiming_directory(size: int) -> bytes:
    """An .npz whose directory claims that its arrays have so many bytes, stored as they are."""
    data = bytearray(zip_of(claiming(size - len(claiming(size)))))
    start = -1
    while (start := data.find(b"PK\1\2", start + 1)) >= 0:
        data[start + 20 : start + 28] = size.to_bytes(4, "little") * 2
    return bytes(data)


def refused_in_little_memory(read: Callable[[], object], message: str) -> None:
    """One line, and less than a megabyte is asked for before."""
    tracemalloc.start()
    try:
        with pytest.raises(RearError, match=message):
            read()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [zip_of(claiming(10**13)), zip_of(claiming(10**9)), zip_of(b"no array"), claiming_directory(2**31)],
    ids=["1e13", "1e9", "text", "directory"],
)
def test_claims_of_arrays_take_no_memory(content: bytes, tmp_path: Path):
    """1e13 values in a file of 1 kB, as many as memory may have room for, and a member that is text."""
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    refused_in_little_memory(lambda: open_source("arrays", str(path), ""), r"a\.npz cannot be read")
    refused_in_little_memory(lambda: open_import(path, LIMITS), r"a\.npz cannot be read")


@pytest.mark.parametrize("count", [10**13, 10**9])
def test_claims_of_npy_files_take_no_memory(count: int, tmp_path: Path):
    for folder in ("a_codes", "a_labels"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.npy").write_bytes(claiming(count))
    refused_in_little_memory(lambda: open_import(tmp_path, LIMITS), r"0\.npy cannot be read")


@pytest.mark.parametrize("name", ["images.npy", "done.npy"])
def test_claims_of_a_set_that_was_begun_take_no_memory(name: str, tmp_path: Path):
    SampledSet(tmp_path / "set", {}, (3, 2, 2, 3), write=True)
    (tmp_path / "set" / name).write_bytes(claiming(10**13))
    for write in (True, False):
        refused_in_little_memory(
            lambda write=write: SampledSet(tmp_path / "set", {}, (3, 2, 2, 3), write=write),
            rf"{name} cannot be read .*delete .*set",
        )


def test_a_kept_index_that_claims_much_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.tar").write_bytes(tar_of("json", RECORDS))
    files, arrays = [tmp_path / "a.tar"], {"offsets": np.arange(3)}
    kept_index(files, "x", lambda: arrays)
    (place,) = tmp_path.glob(".rear_jax-*.npz")
    place.write_bytes(zip_of(claiming(10**13)))
    np.testing.assert_array_equal(kept_index(files, "x", lambda: arrays)["offsets"], arrays["offsets"])
    assert "cannot be read" in caplog.text
    assert np.load(place)["offsets"].tolist() == [0, 1, 2]


def test_a_tar_whose_headers_go_in_circles(tmp_path: Path):
    """A size below zero would lead back to the same header."""
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (2**96 - 512).to_bytes(12)  # base 256: -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) * 4)
    with pytest.raises(RearError, match=r"a\.tar"):
        open_source("webdataset", str(tmp_path / "a.tar"), "")
