"""Sources of images with classes: what holds for every form of one set."""

import itertools
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rear_jax.config import default
from rear_jax.data.batches import image_batches
from rear_jax.data.sources import open_source, open_split, source_settings, split_facts, with_class_count
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES, decode
from rear_jax.data.sources.interface import SourceSettings, captioned
from rear_jax.errors import RearError
from tests.test_decoding import modes
from tests.toy_pairs import encoded, picture, write_tar
from tests.toy_sources import FORMS, LABELS, NAMED, NAMES, pictures, saved, write_form


def settings_of(source: str, path: str, **changes):
    config = default()
    config.data.update({"source": source, "path": path, "eval_split": "test", "num_classes": 0} | changes)
    return config


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_images_and_classes(form: str, tmp_path: Path):
    source = open_source(*write_form(form, tmp_path, pictures()), "train")
    assert not captioned(source)
    assert (len(source), source.num_classes) == (len(LABELS), 3)
    assert source.class_names == (NAMES if form in NAMED else ())
    for index, label in enumerate(LABELS):
        image, found = source[index]
        assert found == label
        np.testing.assert_array_equal(image, picture(index))
    assert source[np.int64(-1)][1] == 2
    with pytest.raises(IndexError):
        source[len(LABELS)]


@pytest.mark.parametrize("form", FORMS)
def test_classes_are_counted_and_numbered_by_the_training_split(form: str, tmp_path: Path):
    """The held-out split lacks the first class; its own numbers, where it has names, would be others."""
    name, path = write_form(form, tmp_path, pictures())
    write_form(form, tmp_path, pictures()[:2], labels=(1, 2), split="test")
    if name == "archive":
        path = f"{tmp_path}/{{split}}.{form[:3]}"
    config = with_class_count(settings_of(name, path))
    assert config.data.num_classes == split_facts(config.data, "train").num_classes == 3
    held_out = open_split(config.data, "test")
    assert [held_out[index][1] for index in range(2)] == [1, 2]
    assert held_out.num_classes == 3
    assert source_settings(config.data, "test").class_names == (NAMES if form in NAMED else ())


def _spoil(form: str, root: Path) -> None:
    """Takes the class of an image of the split 'test' away, or the image of a class."""
    if form == "jsonl":
        (root / "test" / "0.png").unlink()
    elif form == "cls":
        write_tar(root / "test-00000.tar", {"0.png": pictures()[0], "1.png": pictures()[1], "1.cls": b"0"})
    else:
        file = next(root.glob("data/test-*.parquet"))
        table = pq.read_table(file)
        field = table.schema.field("label")
        pq.write_table(table.set_column(1, field, pa.array([None, 0], field.type)), file)


@pytest.mark.parametrize("form", ["jsonl", "cls", "parquet"])
def test_what_is_broken_counts_for_the_split_that_holds_it(form: str, tmp_path: Path, caplog):
    """Of archives, which may hold several splits in one file, see test_archive_source.py."""
    for split in ("train", "test"):
        source = write_form(form, tmp_path, pictures()[:2], labels=(0, 1), split=split)
    _spoil(form, tmp_path)
    assert len(open_source(*source, "train")) == 2
    assert "broken" not in caplog.text
    with pytest.raises(RearError, match="1 of 2 are broken"):
        open_source(*source, "test")


EXTRA = {
    "JPEG, CMYK": ("jpg", lambda flat: saved(flat.convert("CMYK"), "JPEG")),
    "JPEG as .jfif": ("jfif", lambda flat: saved(flat, "JPEG")),
    "WEBP, moving": ("webp", lambda flat: saved(flat, "WEBP", save_all=True, append_images=[flat.rotate(90)])),
    "AVIF": ("avif", lambda flat: saved(flat, "AVIF")),
    "PNG, turned": ("png", lambda flat: saved(flat, "PNG", exif=_turned())),
    "TIFF, several pages": ("tiff", lambda flat: saved(flat, "TIFF", save_all=True, append_images=[flat])),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes_every_mode(form: str, tmp_path: Path):
    """What is in a file decides, not its suffix; the levels themselves are tested beside `decode`."""
    flat = Image.fromarray(picture(3))
    files = [file for file, _ in modes().values()]
    files += [make(flat) for suffix, make in EXTRA.values() if f".{suffix}" in IMAGE_SUFFIXES]
    source = open_source(*write_form(form, tmp_path, files, labels=[0] * len(files)), "train")
    for index, file in enumerate(files):
        image, _ = source[index]
        assert (image.dtype, image.shape[2]) == (np.uint8, 3)
        np.testing.assert_array_equal(image, decode(file, "x"))


@pytest.mark.parametrize("suffix", sorted({suffix for suffix, _ in EXTRA.values()} | {"bmp", "gif", "tif", "JPG"}))
@pytest.mark.parametrize("form", ["folder", "zip", "tar", "jsonl", "cls"])
def test_every_form_knows_the_suffixes(form: str, suffix: str, tmp_path: Path):
    if f".{suffix.lower()}" not in IMAGE_SUFFIXES:
        pytest.skip("this Pillow does not read it")
    name, path = write_form(form, tmp_path, [encoded(picture(0))], labels=[0], suffix=suffix)
    np.testing.assert_array_equal(open_source(name, path, "train")[0][0], picture(0))


# --- order, resume, hosts


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_within_an_epoch_and_hosts_share_it(form: str, tmp_path: Path):
    name, path = write_form(form, tmp_path, pictures()[:6], labels=LABELS[:6])

    def batches(count: int, **rest) -> list[dict[str, np.ndarray]]:
        source = open_source(name, path, "train")
        stream = image_batches(source, image_size=8, augment="crop_flip", batch_size=2, seed=3, num_threads=0, **rest)
        found = list(itertools.islice(stream, count))
        stream.close()
        return found

    whole = batches(6)
    resumed = batches(2, start_step=4)  # the second epoch begins at step 3
    hosts = [batches(3, process_index=p, process_count=2) for p in range(2)]
    for key in ("image", "label", "index"):
        for one, other in zip(resumed, whole[4:], strict=True):
            np.testing.assert_array_equal(one[key], other[key])
        for step in range(3):
            np.testing.assert_array_equal(np.concatenate([host[step][key] for host in hosts]), whole[step][key])
    seen = [int(batch["index"][0]) for host in hosts for batch in host]
    assert sorted(seen) == list(range(6))


# --- what is broken


@pytest.mark.parametrize("form", FORMS)
def test_empty_and_cut_images_are_named_once_and_replaced(form: str, tmp_path: Path, caplog):
    files = pictures()
    files[1], files[3] = b"", files[3][: len(files[3]) // 2]
    name, path = write_form(form, tmp_path, files)
    source = open_source(name, path, "train", SourceSettings(max_broken_share=0.3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert [source[index][1] for index in range(7)] == [0, 1, 1, 2, 2, 2, 2]
    np.testing.assert_array_equal(source[3][0], picture(4))
    told = [record.getMessage() for record in caplog.records if "the next readable image" in record.getMessage()]
    assert len(told) == 2
    strict = open_source(name, path, "train", SourceSettings(max_broken_share=0.2))
    with pytest.raises(RearError, match=r"2 of 7 are broken so far, config\.data\.max_broken_share = 0\.2") as raised:
        [strict[index] for index in range(7)]
    assert "\n" not in str(raised.value)
