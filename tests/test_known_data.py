"""Data are known by all their images, classes by their names; pictures, labels and files of other forms are taken."""

import io
import json
import logging
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict
from PIL import Image

from rear_jax.config import default
from rear_jax.data import imports
from rear_jax.data.codes_header import CodesHeader, as_json, refuse_other_plan
from rear_jax.data.fashion_mnist import load_full
from rear_jax.data.imports import Limits, open_import
from rear_jax.data.sources import forget_splits, open_source, open_split, split_facts
from rear_jax.data.sources.decoding import LONGEST, decode
from rear_jax.errors import RearError
from rear_jax.evaluation.label_scores import ClassAccuracy, Nothing, label_scores
from rear_jax.evaluation.reference import RealImages, plan_reference
from rear_jax.evaluation.samples import not_comparable, open_samples
from rear_jax.jobs import evaluate
from rear_jax.metrics.features import FeatureExtractor, Network
from rear_jax.metrics.scores import Reference
from rear_jax.runtime.atomic import write_json
from rear_jax.runtime.identity import is_done

LIMITS = Limits(codes_per_image=4, codebook_size=16, num_classes=10)


@pytest.fixture(autouse=True)
def fresh():
    """No split that another test has opened."""
    forget_splits()


def picture(index: int = 0) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def folder(root: Path, names: tuple[str, ...]) -> Path:
    """Class folders, each file with pixels of its own."""
    for index, name in enumerate(names):
        write(root / name, encoded(picture(index), "BMP"))
    return root


def data_of(source: str, path: Path, num_classes: int = 3) -> ConfigDict:
    data = default().data
    data.update(source=source, path=str(path), num_classes=num_classes, train_split="train", eval_split="val")
    return data


# --- what was made of images knows them


def later(path: Path) -> None:
    """As if it had been written again a second later."""
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 10**9))


def repaired(root: Path) -> None:
    """The last of many pictures, with the same name and size."""
    write(root / "bee" / "99.bmp", encoded(picture(7), "BMP"))
    later(root / "bee" / "99.bmp")


CHANGES = {
    "repaired": repaired,
    "added": lambda root: write(root / "ant" / "more.bmp", encoded(picture(1), "BMP")),
    "removed": lambda root: (root / "bee" / "50.bmp").unlink(),
    "renamed": lambda root: (root / "bee" / "50.bmp").rename(root / "bee" / "50b.bmp"),
    "other class": lambda root: (root / "bee" / "50.bmp").rename(root / "ant" / "zz.bmp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_contents_know_every_picture_of_a_folder(change: str, tmp_path: Path):
    root = folder(tmp_path / "a", ("ant/0.bmp", *(f"bee/{i}.bmp" for i in range(100))))
    before = open_source("folder", str(root), "").contents
    assert open_source("folder", str(root), "").contents == before
    shutil.copytree(root, tmp_path / "b")  # with the times
    assert open_source("folder", str(tmp_path / "b"), "").contents == before
    CHANGES[change](root)
    assert open_source("folder", str(root), "").contents != before


def test_contents_of_shards_and_arrays(tmp_path: Path):
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name, content in (("a.png", encoded(picture())), ("a.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    both = open_source("webdataset", str(tmp_path), "").contents
    later(tmp_path / "1.tar")
    changed = open_source("webdataset", str(tmp_path), "").contents
    (tmp_path / "1.tar").unlink()
    assert len({both, changed, open_source("webdataset", str(tmp_path), "").contents}) == 3
    images, labels = np.stack([picture(i) for i in range(100)]), np.arange(100)
    found = set()
    for place in (None, (57, 3, 3, 1), (99, 7, 7, 2)):
        if place:
            images[place] ^= 1
        np.savez(tmp_path / "a.npz", images=images, labels=labels)
        found.add(open_source("arrays", str(tmp_path / "a.npz"), "").contents)
    np.savez(tmp_path / "a.npz", images=images, labels=labels[::-1])
    assert len(found | {open_source("arrays", str(tmp_path / "a.npz"), "").contents}) == 4


def test_contents_of_pairs(tmp_path: Path):
    folder(tmp_path, ("0.bmp", "in/1.bmp"))
    rows = [{"file_name": name, "text": "a dog"} for name in ("0.bmp", "in/1.bmp")]
    metadata = write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    found = [open_source("imagefolder", str(tmp_path), "").contents for _ in range(2)]
    assert found[0] == found[1]
    for file in (metadata, tmp_path / "in" / "1.bmp"):
        later(file)
        found.append(open_source("imagefolder", str(tmp_path), "").contents)
    assert len(set(found)) == 3


def test_codes_of_other_images_are_refused(tmp_path: Path):
    fields = (6, 1, "center", 4, 16, 32, 10, "f00", "set", "train", 2)
    new, old = CodesHeader(*fields, images="a" * 15), CodesHeader(*fields)
    write_json(tmp_path / "header.json", as_json(new))
    assert refuse_other_plan(tmp_path, new)
    with pytest.raises(RearError, match=r"codes of other images: .*delete it to tokenize again"):
        refuse_other_plan(tmp_path, CodesHeader(*fields, images="b" * 15))
    write_json(tmp_path / "header.json", as_json(old))
    assert refuse_other_plan(tmp_path, old)
    with pytest.raises(RearError, match=r"before codes noted of which images they are; delete it"):
        refuse_other_plan(tmp_path, new)


def test_references_of_other_images_have_other_names(tmp_path: Path):
    folder(tmp_path / "train", tuple(f"ant/{i}.bmp" for i in range(40)))
    data = data_of("folder", tmp_path)
    before = RealImages(data, "train", 5).fingerprint()
    assert RealImages(data, "train", 5).fingerprint() == before
    later(tmp_path / "train" / "ant" / "17.bmp")
    assert RealImages(data, "train", 5).fingerprint() != before


# --- class numbers


def test_names_number_the_classes_of_every_split(tmp_path: Path, caplog):
    folder(tmp_path, ("train/ant/0.bmp", "train/bee/0.bmp", "train/cat/0.bmp", "val/ant/0.bmp", "val/cat/0.bmp"))
    data = data_of("folder", tmp_path)
    held_out = open_split(data, "val")
    assert held_out.class_names == ("ant", "bee", "cat")
    assert [label for _, label in (held_out[0], held_out[1])] == [0, 2]
    assert split_facts(data, "val").num_classes == 3
    folder(tmp_path, ("val/dog/0.bmp",))
    with pytest.raises(RearError, match=r"val has classes that the training split lacks: dog; remove them"):
        open_split(data, "val")
    shutil.rmtree(tmp_path / "train")
    forget_splits()
    assert open_split(data, "val").class_names == ("ant", "cat", "dog")
    assert "class numbers of their own" in caplog.text


def write_parquet(path: Path, names: list[str], labels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = {"info": {"features": {"label": {"names": names}}}}
    table = pa.table({"image": [encoded(picture(i)) for i in range(len(labels))], "label": labels})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def test_names_of_parquet_number_its_classes(tmp_path: Path):
    write_parquet(tmp_path / "train" / "0.parquet", ["ant", "bee", "cat"], [0, 1, 2])
    write_parquet(tmp_path / "val" / "0.parquet", ["cat", "dog", "ant"], [0, 2])
    held_out = open_split(data_of("parquet", tmp_path), "val")
    assert [held_out[i][1] for i in range(2)] == [2, 0]
    assert held_out.class_names == ("ant", "bee", "cat")
    write_parquet(tmp_path / "val" / "0.parquet", ["cat", "dog", "ant"], [0, 1])
    with pytest.raises(RearError, match="lacks: dog"):
        open_split(data_of("parquet", tmp_path), "val")


def test_classes_that_nobody_sees_are_told_once(tmp_path: Path, caplog):
    folder(tmp_path, ("train/ant/0.bmp", "train/bee/0.bmp", "val/ant/0.bmp"))
    data = data_of("folder", tmp_path, num_classes=1000)
    for split in ("train", "val", "train"):
        open_split(data, split)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "train has 2 classes where config.data.num_classes is 1000" in message
    assert "set it to 2" in message


# --- pictures, labels and files of other forms


def test_twelve_bits_of_tiff():
    """A TIFF with one strip of 12-bit grey: 4095 is white."""
    tags = ((256, 3, 2), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 3))
    header = b"II*\0" + (12).to_bytes(4, "little")
    packed = b"\xff\xf8\x00\x00"  # 4095, 2048
    entries = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + b"\1\0\0\0" + value.to_bytes(4, "little")
        for tag, kind, value in tags
    )
    file = header + packed + len(tags).to_bytes(2, "little") + entries + b"\0\0\0\0"
    assert decode(file, "x")[0, :, 0].tolist() == [255, 128]


def test_sixteen_bits_of_colour():
    """A PNG whose channels have 16 bits keeps their upper halves."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + np.array([0xFF00, 0x8000, 0x0100], ">u2").tobytes()
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    file += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    assert decode(file, "x")[0, 0].tolist() == [255, 128, 1]


@pytest.mark.parametrize("size", [(13_100, 13_000), (20 * LONGEST + 10, 20)])
def test_pictures_too_large_are_refused_before_they_are_decoded(size: tuple[int, int], tmp_path: Path):
    stream = io.BytesIO()
    Image.new("1", size).save(stream, "PNG")
    with pytest.raises(RearError, match=rf"x is not a readable image .*{size[0]} x {size[1]}"):
        decode(stream.getvalue(), "x")


def test_links_in_circles_are_left_out(tmp_path: Path, caplog):
    folder(tmp_path, ("ant/0.bmp",))
    for place in (tmp_path / "bee", tmp_path / "ant" / "1.png", tmp_path / "ant" / "more"):
        os.symlink(place.name, place)
    assert open_source("folder", str(tmp_path), "").class_names == ("ant",)
    assert "left out 2 files" in caplog.text


def test_no_other_format_is_read():
    with pytest.raises(RearError, match="x is not a readable image"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "x")


def test_pipes_and_devices_are_no_pictures(tmp_path: Path, caplog):
    folder(tmp_path, ("ant/0.bmp",))
    os.mkfifo(tmp_path / "ant" / "1.png")
    os.symlink("/dev/zero", tmp_path / "ant" / "2.png")
    os.symlink("/nowhere", tmp_path / "ant" / "3.png")
    source = open_source("folder", str(tmp_path), "")
    assert [file.name for file in source.files] == ["0.bmp", "3.png"]
    assert "left out 2 files" in caplog.text
    for name in ("1.png", "2.png", "3.png"):
        with pytest.raises(RearError, match=rf"{name} is not a readable image"):
            decode(tmp_path / "ant" / name, name)
    for kind, name in (("arrays", "a.npz"), ("webdataset", "a.tar"), ("parquet", "a.parquet")):
        os.mkfifo(tmp_path / name)
        with pytest.raises(RearError):
            open_source(kind, str(tmp_path / name), "")
    for name in ("a.jsonl", "a.npz"):
        if not (tmp_path / name).exists():
            os.mkfifo(tmp_path / name)
        with pytest.raises(RearError, match="is neither"):
            open_import(tmp_path / name, LIMITS)
    os.mkfifo(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(RearError, match="is missing"):
        load_full(tmp_path, "train")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.int64])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_arrays_of_other_shapes_and_types(dtype: type, shape: tuple[int, ...], tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(dtype)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(4).astype(dtype).reshape(shape))
    source = open_source("arrays", str(tmp_path / "a.npz"), "")
    image, label = source[3]
    assert (label, image.dtype) == (3, np.uint8)
    np.testing.assert_array_equal(image, np.repeat(images[3], 3, axis=2))


def test_arrays_of_sixteen_bits(tmp_path: Path):
    levels = np.array([0, 128, 129, 65535], np.uint16).reshape(1, 2, 2)
    np.savez(tmp_path / "a.npz", images=levels, labels=np.zeros(1, int))
    assert open_source("arrays", str(tmp_path / "a.npz"), "")[0][0][..., 0].ravel().tolist() == [0, 0, 1, 255]
    np.savez(tmp_path / "a.npz", images=levels.astype(np.int32) - 1, labels=np.zeros(1, int))
    with pytest.raises(RearError, match=r"not in \[0, 255\]; store the images as uint8"):
        open_source("arrays", str(tmp_path / "a.npz"), "")


@pytest.mark.parametrize(
    ("at", "blank"), [(0, b"\n"), (1, b"\n"), (3, b" \r\n\n\n"), (6, b"\n"), (6, b"  "), (0, b"\xef\xbb\xbf")]
)
def test_blank_lines_hold_no_codes(at: int, blank: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(imports, "LINES_AT_ONCE", 2)
    lines = [json.dumps({"class_id": i, "tokens": [i, 1, 2, 3]}).encode() + b"\n" for i in range(6)]
    path = write(tmp_path / "a.jsonl", b"".join([*lines[:at], blank, *lines[at:]]))
    source = open_import(path, LIMITS)
    for start, stop in ((0, 6), (1, 4), (5, 6)):
        codes, labels, _ = source.read(start, stop)
        assert labels.tolist() == codes[:, 0].tolist() == list(range(start, stop))
    path.write_bytes(path.read_bytes().replace(b'"class_id": 5', b'"class_id": 50'))
    number = path.read_bytes().split(b"\n").index(lines[5].strip().replace(b'"class_id": 5', b'"class_id": 50')) + 1
    with pytest.raises(RearError, match=rf"line {number}: a label is outside"):
        open_import(path, LIMITS).read(0, 6)


def test_zeros_may_precede_the_numbers_of_files(tmp_path: Path):
    for number in range(11):
        for kind, value in (("codes", np.full((1, 1, 4), number)), ("labels", np.array([number % 10]))):
            (tmp_path / f"set_{kind}").mkdir(exist_ok=True)
            name = f"{number:03d}.npy" if kind == "codes" else f"{number}.npy"
            np.save(tmp_path / f"set_{kind}" / name, value)
    codes, _, _ = open_import(tmp_path, LIMITS).read(0, 11)
    assert codes[:, 0].tolist() == list(range(11))
    np.save(tmp_path / "set_codes" / "3.npy", np.zeros((1, 1, 4), int))
    with pytest.raises(RearError, match="are the same number"):
        open_import(tmp_path, LIMITS)


# --- evaluation


def samples(place: Path, **arrays: np.ndarray) -> Path:
    np.savez(place / "samples.npz", arr_0=np.stack([picture(i) for i in range(4)]), **arrays)
    return place


def test_samples_of_others(tmp_path: Path, caplog):
    assert open_samples(samples(tmp_path)).labels is None
    assert "has no array labels or arr_1" in caplog.text
    for arrays in ({"arr_1": np.arange(4)}, {"labels": np.arange(4, dtype=np.uint64)[:, None]}):
        np.testing.assert_array_equal(open_samples(samples(tmp_path, **arrays)).labels, range(4))
    for bad in (np.arange(4.0), np.arange(-1, 3), np.arange(3), np.zeros((4, 2), int), np.full(4, 2**40)):
        with pytest.raises(RearError, match="needs one integer from 0 on for each; correct it") as raised:
            open_samples(samples(tmp_path, labels=bad))
        assert "delete" not in str(raised.value)
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8), labels=np.zeros(0, int))
    with pytest.raises(RearError, match="no images arr_0"):
        open_samples(tmp_path)


def test_scores_of_others_are_not_done(tmp_path: Path):
    for content in (b"", b"[]", b"\xff\xfe", b'{"recipe": 3}', b"[" * 100_000):
        assert not is_done(write(tmp_path / "scores.json", content), {"recipe": {"seed": 0}})


def test_samples_without_labels_do_not_compare_with_published_ones(tmp_path: Path):
    network = Network(FeatureExtractor("Inception", "", 2048, None, fid=True), "f00", "")
    plan = plan_reference_of(tmp_path)
    reasons = not_comparable(network, plan, open_samples(samples(tmp_path)), 1000)
    assert "there are 4 samples, 0 to 0 of each of 1000 classes, not 50 of each of 1000" in reasons


def plan_reference_of(place: Path):
    np.savez(place / "reference.npz", arr_0=np.stack([picture(i) for i in range(4)]))
    config = default()
    config.evaluate.reference = str(place / "reference.npz")
    return plan_reference(config, Network(FeatureExtractor("x", "", 4, None), "f00", ""))


def test_a_folder_is_no_reference(tmp_path: Path):
    config = default()
    config.evaluate.reference = str(tmp_path)
    with pytest.raises(RearError, match=r"is a folder: give an \.npz of images"):
        plan_reference(config, Network(FeatureExtractor("x", "", 4, None), "f00", ""))


def test_a_batch_of_none_is_told_before_a_file_is_blamed(tmp_path: Path):
    config = default()
    config.evaluate.update(batch_size=0, tokenizer=False)
    for call in (lambda: evaluate.check(config, tmp_path, ()), lambda: evaluate.gather(config, tmp_path, tmp_path)):
        with pytest.raises(RearError, match=r"config\.evaluate\.batch_size = 0: choose at least 1"):
            call()


def reference_of(labels: np.ndarray) -> Reference:
    features = np.random.default_rng(0).normal(size=(len(labels), 5)).astype(np.float32) + labels[:, None]
    return Reference("x", "f00", 8, None, None, features, labels)


def test_one_class_leaves_accuracy_out(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    folder(tmp_path / "train", ("ant/0.bmp",))
    config = default()
    config.data = data_of("folder", tmp_path, 1)
    found = label_scores(config, tmp_path, reference_of(np.zeros(20, int)), drawn="samples")
    assert type(found) is Nothing
    assert "class_accuracy is left out" in caplog.text


def test_accuracy_of_classes_that_nobody_saw(caplog):
    real = reference_of(np.arange(60) % 3)
    accuracy = ClassAccuracy(real)
    assert accuracy.scores("samples", real.features, real.labels)["class_accuracy"] > 0.5
    assert accuracy.scores("samples", real.features, None) == {}
    assert accuracy.scores("samples", real.features, real.labels + 1) == {}
    assert "1 of its classes, such as 3, are in no image" in caplog.text
