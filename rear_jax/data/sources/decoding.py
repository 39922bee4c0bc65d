"""One function that decodes the image files of all sources, and the names that image files have."""

import os
import stat
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from rear_jax.errors import UNREADABLE, RearError, one_line

# What Pillow reads; the codec of the last two is not in every build of it.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff"),
    *(f".{codec}" for codec in ("webp", "avif") if features.check(codec)),
)
# Formats that are looked for, whatever a file is called: Pillow knows others, one of which starts a program.
FORMATS = (
    *("PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM"),
    *(codec.upper() for codec in ("webp", "avif") if features.check(codec)),
)
# EXIF orientation -> what makes the picture upright; 1 is upright. Source: EXIF 2.32, tag 274.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # of a picture, 89 million: above it Pillow warns of a decompression bomb
LONGEST = 100  # times the short side: resized to a short side of 256 pixels, a strip of 25,600 is left
BITS_PER_SAMPLE = 258  # of TIFF's tags
_BROKEN = (*UNREADABLE, Image.DecompressionBombError, NotImplementedError)  # Pillow's


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out without a word: `.ipynb_checkpoints`, `._photo.png` or `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def decode(file: Path | bytes, where: str) -> np.ndarray:
    """Any image file as uint8 [H, W, 3]; `where` names it in the error.

    The first frame is taken of an animation, alpha is dropped, 12 and 16 bits of grey become 8, and the picture is
    turned as its EXIF orientation says.

    Raises RearError: it is no image, no regular file, damaged, too large, or has pixels that no rule makes 8 bits of.
    """
    try:
        with _opened(file) as stream, Image.open(stream, formats=FORMATS) as picture:
            require_sides(*picture.size)
            picture.load()
            return np.asarray(_upright(_as_rgb(picture), _orientation(picture)))
    except UnidentifiedImageError:  # its own words name a stream
        raise RearError(f"{where} is not a readable image (its format is not known); replace or remove it") from None
    except _BROKEN as error:
        reason = one_line(str(error)) or type(error).__name__
        raise RearError(f"{where} is not a readable image ({reason}); replace or remove it") from None


class Look(NamedTuple):
    """What an image file is: its format and mode as Pillow calls them, its sides in pixels before it is turned."""

    format: str
    mode: str
    width: int
    height: int
    turned: bool = False  # by its EXIF orientation
    moving: bool = False  # of several frames


def examine(file: Path | bytes, where: str) -> tuple[np.ndarray, Look]:
    """As `decode`, and what the file is; raises RearError as `decode`."""
    image = decode(file, where)
    with _opened(file) as stream, Image.open(stream, formats=FORMATS) as picture:
        turned = _orientation(picture) in _UPRIGHT
        return image, Look(picture.format or "", picture.mode, *picture.size, turned, _is_moving(picture))


def require_sides(width: int, height: int) -> None:
    """Raises ValueError where a picture of these sides takes too much memory: whole, or resized to be cropped."""
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} are more than {MOST_PIXELS} pixels")
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(f"of its sides {width} x {height} one is more than {LONGEST} times the other")


def _opened(file: Path | bytes) -> BinaryIO:
    """A stream of a picture's bytes; raises ValueError where the file is none of a disk, which might never end."""
    if isinstance(file, bytes):
        return BytesIO(file)
    stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe without a writer would wait
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise ValueError("it is no regular file")


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if picture.mode.startswith("I"):  # up to 16 bits of grey, in some formats held in 32
        picture = Image.fromarray(eight_bits(np.asarray(picture), _white(picture)))
    if "transparency" in picture.info or picture.mode in ("PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def eight_bits(grey: np.ndarray, white: int) -> np.ndarray:
    """Integers in [0, white] to the nearest of 256 levels, uint8; raises ValueError where one is outside."""
    if grey.min() < 0 or grey.max() > white:
        raise ValueError(f"its pixels are not in [0, {white}]")
    return ((grey.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)


def _white(picture: Image.Image) -> int:
    """The level of white: TIFF may have 12 bits in the place of 16."""
    bits = picture.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if isinstance(picture, TiffImageFile) else 16
    return 2**12 - 1 if bits == 12 else 2**16 - 1


def _orientation(picture: Image.Image) -> int | None:
    """EXIF orientation; None where there is none or EXIF is damaged, which leaves the pixels as they are."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:
        return None


def _is_moving(picture: Image.Image) -> bool:
    """Whether there are several frames; later ones may be damaged."""
    try:
        return getattr(picture, "n_frames", 1) > 1
    except _BROKEN:
        return False


def _upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
