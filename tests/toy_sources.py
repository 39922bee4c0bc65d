"""One small set of images with classes, in every form in which a source may hold it."""

import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.toy_pairs import encoded, picture, write_csv, write_jsonl, write_tar

NAMES = ("ant", "bee", "cat")
LABELS = (0, 0, 1, 2, 2, 2, 2)  # in the order of class folders
FORMS = ("folder", "zip", "zip deflated", "tar", "jsonl", "csv", "cls", "json", "parquet", "parquet names")
NAMED = ("folder", "zip", "zip deflated", "tar", "jsonl", "json", "parquet", "parquet names")  # classes have names


def pictures() -> list[bytes]:
    return [encoded(picture(index)) for index in range(len(LABELS))]


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _write_files(root: Path, files: dict[str, bytes]) -> list[str]:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return list(files)


def write_form(
    form: str, root: Path, files: Sequence[bytes], *, labels: Sequence[int] = LABELS, split: str = "train", suffix="png"
) -> tuple[str, str]:
    """Writes image files with classes as a split in `root`; the source and what it is opened by."""
    in_folders = {
        f"{split}/{NAMES[label]}/{number:02}.{suffix}": content
        for number, (content, label) in enumerate(zip(files, labels, strict=True))
    }
    if form == "folder":
        _write_files(root, in_folders)
        return "folder", str(root)
    if form in ("zip", "zip deflated"):
        method = zipfile.ZIP_DEFLATED if "deflated" in form else zipfile.ZIP_STORED
        return "archive", str(write_zip(root / f"{split}.zip", in_folders, method))
    if form == "tar":
        return "archive", str(write_tar(root / f"{split}.tar", in_folders))
    if form in ("jsonl", "csv"):
        names = _write_files(root / split, {f"{number}.{suffix}": content for number, content in enumerate(files)})
        if form == "csv":
            write_csv(root / split, [("label", "file_name"), *zip(labels, names, strict=True)])
        else:
            rows = zip(names, labels, strict=True)
            write_jsonl(root / split, [{"file_name": name, "label": NAMES[label]} for name, label in rows])
        return "imagefolder", str(root)
    if form in ("cls", "json"):
        members = {}
        for number, (content, label) in enumerate(zip(files, labels, strict=True)):
            beside = json.dumps({"label": NAMES[label]}) if form == "json" else str(label)
            members |= {f"{number:02}.{suffix}": content, f"{number:02}.{form}": beside.encode()}
        write_tar(root / f"{split}-00000.tar", members)
        return "webdataset", str(root)
    named = form == "parquet names"
    table = pa.table({"image": [{"bytes": one, "path": None} for one in files], "label": list(labels)})
    if named:
        table = pa.table({"image": list(files), "label": [NAMES[label] for label in labels]})
    features = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    table = table if named else table.replace_schema_metadata({"huggingface": json.dumps(features)})
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "data" / f"{split}-00000-of-00001.parquet", row_group_size=3)
    return "parquet", str(root)


def saved(image, kind: str, **options) -> bytes:
    """A Pillow image as a file of some kind."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
