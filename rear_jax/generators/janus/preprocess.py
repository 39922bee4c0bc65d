"""Pictures as Janus's image tower sees them: whole, on a grey square, normalised.

The longer side becomes the tower's size by Pillow's bicubic resizing, the shorter one keeps the proportion but is 14
pixels at least, and grey fills the rest on both sides. The fractions of a pixel are rounded as in the package
`transformers`; in the authors' code they are cut off.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SMALLEST_SIDE = 14  # pixels
BACKGROUND = 127  # of 255
MEAN = STD = 0.5  # of every colour, in [0, 1]


def on_a_square(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A picture in the middle of a grey square of S = `size` pixels a side.

    Pillow resizes rows first. Where that would make a tall strip larger before it makes it smaller, columns are resized
    first, which changes a pixel by about one of 255 levels: so no array is larger than the picture or the square.
    """
    height, width = (max(round(side * size / max(image.shape[:2])), SMALLEST_SIDE) for side in image.shape[:2])
    picture = Image.fromarray(image)
    if picture.height > height and picture.width < width:
        picture = picture.resize((picture.width, height), Image.Resampling.BICUBIC)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = np.full((size, size, 3), BACKGROUND, np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = np.asarray(picture)
    return square


def normalised(images: UInt8[np.ndarray, "B S S 3"]) -> Float[np.ndarray, "B S S 3"]:
    """8-bit images as floats from -1 to 1."""
    return (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
