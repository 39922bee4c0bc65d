"""One small set of images with captions, in every form in which a source may hold it."""

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rear_jax.data.sources.interface import CaptionedSource, SourceSettings, captioned

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
