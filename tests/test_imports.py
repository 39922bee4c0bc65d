"""Imported codes: every format comes back as it was, whatever does not fit is named, a killed import goes on."""

import json
from pathlib import Path

import numpy as np
import pytest

from rear_jax.data import codes as code_files
from rear_jax.data.codes import open_codes
from rear_jax.data.imports import Limits, line_bounds, open_import
from rear_jax.errors import RearError
from tests import toy

LIMITS = Limits(codes_per_image=16, codebook_size=16, num_classes=10)  # those of the toy config
IMAGES = 2500  # more than two pieces of lines that are parsed at once


def made(images: int = IMAGES, views: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Random codes [n, A, 16] and labels [n]; class 7 is empty and class 3 the largest."""
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 3, 3, 4, 5, 6, 8, 9], images)
    return rng.integers(0, 16, (images, views, 16)), labels


def write_lines(path: Path, codes: np.ndarray, labels: np.ndarray, **settings) -> Path:
    rows = [{"class_id": int(y), "tokens": x.tolist()} for x, y in zip(codes[:, 0], labels, strict=True)]
    path.write_text("".join(json.dumps(row, **settings) + "\n" for row in rows))
    return path


def write_folder(path: Path, codes: np.ndarray, labels: np.ndarray) -> Path:
    for name, array in (("codes", codes), ("labels", labels)):
        (path / f"imagenet256_{name}").mkdir(parents=True)
        for i in range(len(array)):
            np.save(path / f"imagenet256_{name}" / f"{i}.npy", array[i : i + 1])
    return path


def write_archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def replace_line(path: Path, number: int, line: str) -> Path:
    """Puts another line in place of one, counted from 1."""
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    return path


def assert_holds(source, codes: np.ndarray, labels: np.ndarray) -> None:
    """The source gives these codes [n, A, N] and labels, in pieces of any size."""
    images, views, _ = codes.shape
    assert (source.num_images, source.num_views) == (images, views)
    cut = images // 3
    parts = [source.read(start, stop) for start, stop in ((0, cut), (cut, cut + 1), (cut + 1, images))]
    found, classes, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    np.testing.assert_array_equal(found, codes.reshape(images * views, -1))
    np.testing.assert_array_equal(classes, np.repeat(labels, views))
    np.testing.assert_array_equal(indices, np.tile(np.arange(views), images))
    assert {array.dtype for array in (found, classes, indices)} == {np.dtype(np.int32)}


class TestLines:
    @pytest.mark.parametrize("settings", [{}, {"separators": (",", ":")}, {"indent": None, "sort_keys": True}])
    def test_any_spacing(self, tmp_path, settings):
        codes, labels = made()
        assert_holds(open_import(write_lines(tmp_path / "a.jsonl", codes, labels, **settings), LIMITS), codes, labels)

    @pytest.mark.parametrize("number", [1, 1200])
    @pytest.mark.parametrize(
        "form",
        [
            '{{"tokens":{codes}, "class_id":{label}}}',
            '{{"class_id": {label}, "tokens": {codes}, "image": 7, "crops": [1, 2]}}',
            '{{"note 4": "", "class_id": {label}, "tokens": {codes}}}',
            '  {{"class_id": {label}, "tokens": {codes}}}\t\r',
        ],
    )
    def test_lines_of_other_forms_among_them(self, tmp_path, form, number):
        codes, labels = made()
        path = write_lines(tmp_path / "a.jsonl", codes, labels)
        line = form.format(codes=codes[number - 1, 0].tolist(), label=labels[number - 1])
        assert_holds(open_import(replace_line(path, number, line), LIMITS), codes, labels)

    @pytest.mark.parametrize("change", [lambda t: t.rstrip("\n"), lambda t: t.replace("\n", "\r\n")])
    def test_line_ends(self, tmp_path, change):
        codes, labels = made()
        path = write_lines(tmp_path / "a.jsonl", codes, labels)
        path.write_bytes(change(path.read_text()).encode())
        assert_holds(open_import(path, LIMITS), codes, labels)

    @pytest.mark.parametrize(("text", "bounds"), [("", [0]), ("a", [0, 1]), ("a\n", [0, 2]), ("a\n\nb", [0, 2, 3, 4])])
    def test_line_bounds(self, tmp_path, monkeypatch, text, bounds):
        monkeypatch.setattr("rear_jax.data.imports.SCAN_BYTES", 2)
        (tmp_path / "a").write_text(text)
        np.testing.assert_array_equal(line_bounds(tmp_path / "a"), bounds)

    @pytest.mark.parametrize("number", [1, 1001, IMAGES])
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"class_id": 10, "tokens": [<15>, 1]}', r"a label is outside \[0, 10\): found 10"),
            ('{"class_id": -1, "tokens": [<15>, 1]}', r"a label is outside \[0, 10\): found -1"),
            (
                '{"class_id": 1, "tokens": [<15>, 16]}',
                r"a code is outside \[0, 16\): found 1 to 16",
            ),
            ('{"class_id": 1, "tokens": [<15>, 99999999999999999999]}', "a code is outside|object"),
            ('{"class_id": 1, "tokens": [<15>]}', r"wanted 16 integers .* found \(15,\)"),
            ('{"class_id": 1, "tokens": [<15>, 1, 1]}', r"wanted 16 integers .* found \(17,\)"),
            ('{"class_id": 1, "tokens": [<15>, 1.5]}', "float64"),
            ('{"class_id": "1", "tokens": [<15>, 1]}', "one as class_id, found .*<U1"),
            ('{"class_id": 1, "tokens": [<15>, [1]]}', "cannot be read"),
            ('{"class_id": 1, "codes": [<15>, 1]}', "cannot be read .*tokens"),
            ('{"class_id": 1, "tokens": [1, 2', "cannot be read .*JSON"),
            ('{"class_id": 1, "tokens": [, <15>]}', "cannot be read .*JSON"),
            ("[1, 2]", "cannot be read"),
            ("\0\0\0", "cannot be read .*JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, message, number):
        line = line.replace("<15>", ", ".join("1" * 15))
        path = replace_line(write_lines(tmp_path / "a.jsonl", *made()), number, line)
        with pytest.raises(RearError, match=rf"a\.jsonl, line {number}: .*({message})") as caught:
            open_import(path, LIMITS).read(0, IMAGES)
        assert "\n" not in str(caught.value)

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "a.jsonl").touch()
        with pytest.raises(RearError, match=r"a\.jsonl is empty"):
            open_import(tmp_path / "a.jsonl", LIMITS)


class TestFolder:
    @pytest.mark.parametrize("views", [1, 10])
    def test_views_are_kept_and_files_count_by_number(self, tmp_path, views):
        codes, labels = made(12, views)  # 10.npy comes after 9.npy, not after 1.npy
        assert_holds(open_import(write_folder(tmp_path / "set", codes, labels), LIMITS), codes, labels)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda c, y: (c / "3.npy").unlink(), r"3\.npy is in only one"),
            (lambda c, y: (y / "3.npy").unlink(), r"3\.npy is in only one"),
            (lambda c, y: (c / "x.npy").touch(), "not called by a number"),
            (lambda c, y: (c / "3.npy").write_bytes((c / "3.npy").read_bytes()[:90]), r"_codes/3\.npy cannot be read"),
            (lambda c, y: (y / "3.npy").write_bytes(b""), r"_labels/3\.npy cannot be read"),
            (lambda c, y: np.save(c / "3.npy", np.array([{}])), r"_codes/3\.npy cannot be read"),
            (
                lambda c, y: np.save(c / "3.npy", np.zeros((1, 2, 15), int)),
                r"3\.npy has the shape \(1, 2, 15\), wanted",
            ),
            (
                lambda c, y: np.save(c / "3.npy", np.zeros((1, 3, 16), int)),
                r"3\.npy has the shape \(1, 3, 16\), wanted",
            ),
            (lambda c, y: np.save(c / "0.npy", np.zeros((1, 16), int)), r"0\.npy has the shape .* wanted \[1, A, 16\]"),
            (lambda c, y: np.save(y / "3.npy", np.zeros((), int)), r"_labels/3\.npy has the shape \(\), wanted \[1\]"),
            (
                lambda c, y: np.save(c / "3.npy", np.full((1, 2, 16), 16)),
                r"_codes/3\.npy .*: a code is outside \[0, 16",
            ),
            (lambda c, y: np.save(y / "3.npy", np.array([-1])), r"_codes/3\.npy \(or its label\): a label is outside"),
            (lambda c, y: np.save(c / "3.npy", np.zeros((1, 2, 16))), r"3\.npy .*: codes are float64, not integers"),
            (lambda c, y: c.rename(c.with_name("stuff")), r"must hold one folder \*_codes, .* found none"),
            (
                lambda c, y: (c.parent / "b_labels").mkdir(),
                r"one folder \*_labels, .* found b_labels, imagenet256_labels",
            ),
            (lambda c, y: [file.unlink() for file in c.iterdir()], "holds no .npy files"),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, change, message):
        path = write_folder(tmp_path / "set", *made(5, 2))
        change(path / "imagenet256_codes", path / "imagenet256_labels")
        with pytest.raises(RearError, match=message):
            open_import(path, LIMITS).read(0, 5)


class TestArchive:
    @pytest.mark.parametrize("names", [("codes", "labels"), ("tokens", "class_id"), ("token_ids", "label")])
    @pytest.mark.parametrize("views", [0, 1, 2])
    def test_names_and_shapes(self, tmp_path, names, views):
        codes, labels = made(30, max(views, 1))
        stored = codes.astype(np.int16) if views else codes[:, 0].astype(np.uint16)
        path = write_archive(tmp_path / "a.npz", **dict(zip(names, (stored, labels), strict=True)), extra=np.zeros(2))
        assert_holds(open_import(path, LIMITS), codes, labels)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": np.zeros(29, int)}, r"codes \(30, 2, 16\) and labels \(29,\), wanted"),
            ({"codes": np.zeros(30, int)}, r"codes \(30,\) and labels \(30,\), wanted"),
            (
                {"tokens": np.zeros((30, 16), int)},
                "must hold one array called codes or tokens .* found codes, labels, t",
            ),
            ({"codes": np.zeros((30, 2, 15), int)}, r"a\.npz, image 0: 15 codes an image, the tokenizer makes 16"),
            ({"codes": np.zeros((30, 2, 16))}, r"a\.npz, image 0: codes are float64, not integers"),
            ({"labels": np.arange(30)}, r"a\.npz, image 10: a label is outside \[0, 10\): found 10 to 10"),
            (
                {"codes": np.arange(30)[:, None, None] * np.ones((1, 2, 16), int)},
                r"a\.npz, image 16: a code is outside",
            ),
            ({"labels": np.array([None] * 30)}, r"a\.npz cannot be read"),
        ],
    )
    def test_faults_are_named(self, tmp_path, change, message):
        codes, labels = made(30, 2)
        path = write_archive(tmp_path / "a.npz", **{"codes": codes, "labels": labels} | change)
        with pytest.raises(RearError, match=message):
            open_import(path, LIMITS).read(0, 30)

    def test_missing_arrays_and_damage(self, tmp_path):
        path = write_archive(tmp_path / "a.npz", latents=np.zeros(3), mean=np.zeros(3))
        with pytest.raises(RearError, match="one array called codes or tokens or token_ids; found latents, mean"):
            open_import(path, LIMITS)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(RearError, match=r"a\.npz cannot be read"):
            open_import(path, LIMITS)


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(RearError, match=r"a\.jsonl does not exist: mend config\.import_codes\.source"):
        open_import(tmp_path / "a.jsonl", LIMITS)
    (tmp_path / "a.txt").touch()
    with pytest.raises(RearError, match=r"a\.txt is neither a \.jsonl file"):
        open_import(tmp_path / "a.txt", LIMITS)


def run_import(workdir: Path, trained: Path, source: Path, **changes) -> None:
    settings = {"tokenizer_from": str(trained / "tokenizer"), "import_codes__source": str(source)}
    toy.run(workdir, "import", **settings | changes)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("form", ["lines", pytest.param("folder", marks=pytest.mark.slow), "archive"])
def test_the_job_writes_codes_that_train(trained, tmp_path, form, caplog):
    codes, labels = made(40, 1 if form == "lines" else 2)
    source = {
        "lines": lambda: write_lines(tmp_path / "a.jsonl", codes, labels),
        "folder": lambda: write_folder(tmp_path / "set", codes, labels),
        "archive": lambda: write_archive(tmp_path / "a.npz", codes=codes, labels=labels),
    }[form]()
    with caplog.at_level("INFO", logger="rear_jax"):
        run_import(tmp_path / "run", trained, source)
    assert "the config's word is taken" in caplog.text
    assert "1 classes without any, such as 7" in caplog.text
    written = open_codes(tmp_path / "run" / "codes")
    assert (written.header.num_images, written.header.num_augmentations) == codes.shape[:2]
    assert written.header.source == source.name
    records = written.read(np.arange(len(written)))
    np.testing.assert_array_equal(records["codes"], codes.reshape(-1, 16))
    np.testing.assert_array_equal(records["label"], np.repeat(labels, codes.shape[1]))
    np.testing.assert_array_equal(records["augmentation"], np.tile(np.arange(codes.shape[1]), len(codes)))
    counts = json.loads((tmp_path / "run" / "codes" / "classes.json").read_text())["records"]
    want = np.bincount(np.repeat(labels, codes.shape[1]), minlength=10)
    assert counts == {str(label): count for label, count in enumerate(want.tolist())}
    if form == "folder":
        toy.run(tmp_path / "run", "train", tokenizer_from=str(trained / "tokenizer"))
        *_, last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert np.isfinite(json.loads(last)["loss"])


@pytest.mark.slow
def test_a_killed_import_goes_on(trained, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", *made())
    run_import(tmp_path / "whole", trained, source)
    write_shard, written = code_files.write_shard, []

    def killed(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write_shard(path, *rest)

    monkeypatch.setattr(code_files, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        run_import(tmp_path / "run", trained, source)
    with pytest.raises(RearError, match="not finished"):
        open_codes(tmp_path / "run" / "codes")
    assert not (tmp_path / "run" / "codes" / "classes.json").exists()
    monkeypatch.setattr(
        code_files, "write_shard", lambda path, *rest: (written.append(path.name), write_shard(path, *rest))
    )
    run_import(tmp_path / "run", trained, source)
    assert len(written) == len(set(written)) == 4
    assert content(tmp_path / "run" / "codes") == content(tmp_path / "whole" / "codes")
    run_import(tmp_path / "run", trained, source)  # nothing left to do
    assert len(written) == 4


def test_a_bad_source_leaves_nothing_that_looks_complete(trained, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", *made())
    replace_line(source, 2000, "{}")
    with pytest.raises(RearError, match=r"a\.jsonl, line 2000"):
        run_import(tmp_path / "run", trained, source)
    assert not (tmp_path / "run" / "codes" / "header.json").exists()
    with pytest.raises(RearError, match="not finished"):
        open_codes(tmp_path / "run" / "codes")


@pytest.mark.slow
def test_another_source_of_the_same_name_is_refused(trained, tmp_path):
    codes, labels = made(40)
    run_import(tmp_path / "run", trained, write_lines(tmp_path / "a.jsonl", codes, labels))
    write_lines(tmp_path / "a.jsonl", codes % 10, labels)
    with pytest.raises(RearError, match="was begun with split"):
        run_import(tmp_path / "run", trained, tmp_path / "a.jsonl")


def test_refusals_of_the_job(trained, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", *made(40))
    with pytest.raises(RearError, match=r"config\.import_codes\.source is not given"):
        run_import(tmp_path / "run", trained, source, import_codes__source="")
    with pytest.raises(RearError, match=r"config\.tokenizer_from must give the tokenizer that made the codes"):
        run_import(tmp_path / "run", trained, source, tokenizer_from="")
    with pytest.raises(RearError, match=r"line \d+: a label is outside \[0, 5\)"):
        run_import(tmp_path / "run", trained, source, data__num_classes=5)
    assert not (tmp_path / "run" / "codes" / "header.json").exists()
