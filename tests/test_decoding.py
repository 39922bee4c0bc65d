"""The one decoder of all sources, and folders of classes."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from rear_jax.data.sources import (
    open_source,
)
from rear_jax.data.sources.decoding import IMAGE_SUFFIXES, decode
from rear_jax.errors import RearError
from tests.toy_pairs import TOLERANT, encoded, picture


def save(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of all modes, and the grey levels that each of their 2 x 3 pixels has in all three channels."""
    grey = np.array([[0, 10, 128], [200, 254, 255]], np.uint8)
    flat = Image.fromarray(grey)
    palette = Image.fromarray(grey)
    palette = palette.convert("P")
    alpha = Image.fromarray(np.stack([grey, np.full_like(grey, 3)], -1))
    none = Image.new("L", (3, 2))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    return {
        "L": (save(flat, "PNG"), grey),
        "P": (save(palette, "PNG"), grey),
        "P with transparency": (save(palette, "PNG", transparency=bytes([0, 7])), grey),
        "LA": (save(alpha, "PNG"), grey),
        "RGBA": (save(alpha.convert("RGBA"), "PNG"), grey),
        "1": (save(flat.point(lambda v: 255 * (v > 100)).convert("1"), "PNG"), np.where(grey > 100, 255, 0)),
        "16-bit PNG": (save(deep, "PNG"), grey),
        "16-bit TIFF": (save(deep, "TIFF"), grey),
        "16-bit PGM": (b"P5 3 2 65535\n" + (grey.astype(">u2") * 257).tobytes(), grey),
        "CMYK": (save(Image.merge("CMYK", [none, none, none, flat.point(lambda v: 255 - v)]), "TIFF"), grey),
        "BMP": (save(flat, "BMP"), grey),
        "GIF, first frame": (save(flat, "GIF", save_all=True, append_images=[Image.new("L", (3, 2), 77)]), grey),
    }


@pytest.mark.parametrize("mode", modes())
def test_decode_of_all_modes(mode: str):
    file, grey = modes()[mode]
    found = decode(file, "x")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.repeat(grey[:, :, None], 3, axis=2))


def test_sixteen_bits_are_scaled_to_the_nearest():
    levels = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    found = decode(save(Image.fromarray(levels), "PNG"), "x")
    assert found[0, :, 1].tolist() == [0, 0, 1, 1, 2, 255]


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation: int):
    """As PIL's own `exif_transpose` turns it; 0 and 9 mean nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(Image.fromarray(picture(3)), "PNG", exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(decode(file, "x"), expected)
    assert decode(file, "x").shape == ((8, 12, 3) if 5 <= orientation <= 8 else (12, 8, 3))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_counts_once_in_every_format(kind: str):
    if kind == "AVIF" and ".avif" not in IMAGE_SUFFIXES:
        pytest.skip("this Pillow reads no AVIF")
    turned, plain = Image.Exif(), Image.fromarray(picture(3))
    turned[0x0112] = 6
    expected = np.rot90(decode(save(plain, kind), "x"), -1)  # the camera was turned to the left
    np.testing.assert_array_equal(decode(save(plain, kind, exif=turned), "x"), expected)


def test_damaged_exif_leaves_the_picture_as_it_is():
    file = encoded(picture(0), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(file, "x").shape == picture(0).shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_cut_pictures_are_refused(kind: str):
    if f".{kind.lower()}" not in IMAGE_SUFFIXES and kind == "AVIF":
        pytest.skip("this Pillow reads no AVIF")
    file = save(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), kind)
    assert decode(file, "x").shape == (40, 40, 3)
    for length in (0, 3, 20, len(file) // 2):
        with pytest.raises(RearError, match=r"^x is not a readable image") as raised:
            decode(file[:length], "x")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32)])
def test_pixels_of_no_known_range_are_refused(pixels: np.ndarray):
    with pytest.raises(RearError, match="its pixels"):
        decode(save(Image.fromarray(pixels), "TIFF"), "x")


def test_random_bytes_never_escape_as_other_errors():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        whole = encoded(picture(0), kind)
        for _ in range(30):
            spoilt = bytearray(whole)
            for place in rng.integers(0, len(whole), 4):
                spoilt[place] = rng.integers(256)
            with contextlib.suppress(RearError):
                assert decode(bytes(spoilt), "x").dtype == np.uint8


def test_class_folders_ignore_what_is_hidden_and_count_the_rest(tmp_path: Path, caplog):
    for name in ("ant/0.gif", "ant/1.TIFF", "ant/._2.png", "ant/.ipynb_checkpoints/0.png", "ant/more/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0), "TIFF" if "TIFF" in name else "GIF"))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "stray.png").write_bytes(b"")
    source = open_source("folder", str(tmp_path), "")
    assert source.class_names == ("ant",)
    assert [file.name for file in source.files] == ["0.gif", "1.TIFF"]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "left out 2 files or folders" in message
    assert "stray.png" in message
    assert "ant/more" in message


def test_class_folders_replace_a_broken_image(tmp_path: Path):
    for index, name in enumerate(("ant/0.png", "bee/0.png", "bee/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(index)))
    (tmp_path / "ant/0.png").write_bytes(b"")
    image, label = open_source("folder", str(tmp_path), "", TOLERANT)[0]
    assert label == 1
    np.testing.assert_array_equal(image, picture(1))
