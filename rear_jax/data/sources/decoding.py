"""One function that decodes the image files of all sources, and the names that image files have."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, features

from rear_jax.errors import UNREADABLE, RearError

# What Pillow reads; the codec of the last two is not in every build of it.
IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".tif", ".tiff"),
    *(f".{codec}" for codec in ("webp", "avif") if features.check(codec)),
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
_BROKEN = (*UNREADABLE, Image.DecompressionBombError, NotImplementedError)  # Pillow's


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out without a word: `.ipynb_checkpoints`, `._photo.png` or `__MACOSX`."""
    return name.startswith(".") or name == "__MACOSX"


def decode(file: Path | bytes, where: str) -> np.ndarray:
    """Any image file as uint8 [H, W, 3]; `where` names it in the error.

    The first frame is taken of an animation, alpha is dropped, 16 bits of grey become 8, and the picture is turned as
    its EXIF orientation says.

    Raises RearError: it is no image, damaged, or has pixels that no rule makes 8 bits of.
    """
    try:
        with Image.open(BytesIO(file) if isinstance(file, bytes) else file) as picture:
            picture.load()
            return np.asarray(_upright(_as_rgb(picture), _orientation(picture)))
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RearError(f"{where} is not a readable image ({reason}); replace or remove it") from None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if picture.mode.startswith("I"):  # 16 bits of grey, in some formats held in 32
        grey = np.asarray(picture).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        picture = Image.fromarray(((grey + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    if "transparency" in picture.info or picture.mode in ("PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int | None:
    """EXIF orientation; None where there is none or EXIF is damaged, which leaves the pixels as they are."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:
        return None


def _upright(picture: Image.Image, orientation: int | None) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
