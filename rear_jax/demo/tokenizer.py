"""The tab 'Tokenizer': an image, its codes as a heat map, and what a changed code decodes to."""

import math
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Int, UInt8

from rear_jax.demo import fields
from rear_jax.demo.studio import Studio
from rear_jax.errors import RearError

CELL = 16  # pixels of a code in the heat map, at least
MAP_SIDE = 416  # pixels that it has about
SMALLEST = 256  # pixels of a picture: smaller ones are enlarged
COLOURS = "viridis"


class Edited(NamedTuple):
    """An image that was dropped, and its codes with what the user has changed.

    Attributes:
      image: uint8 [S, S, 3].
      codes: [N], the image's own.
      changed: [N], as they are now.
    """

    image: UInt8[np.ndarray, "S S 3"]
    codes: Int[np.ndarray, " N"]
    changed: Int[np.ndarray, " N"]


def read(studio: Studio, file: str | None) -> Edited:
    """An image of the user's; raises RearError where the file is none."""
    image = studio.read_image(file)
    codes = studio.encode(image)
    return Edited(image, codes, codes)


def replace(studio: Studio, edited: Edited | None, position: int, code: int | None) -> tuple[Edited, str]:
    """Another code at a position; also returns what happened, in one sentence.

    Raises RearError: no image was dropped, or there is no such code or position.
    """
    most = studio.module.codebook_size - 1
    if edited is None:
        raise RearError("There are no codes yet: drop an image first.")
    if code is None or not 0 <= code <= most:
        raise RearError(f"The new code is {'empty' if code is None else code}: give 0 to {most}.")
    if not 0 <= position < studio.num_codes:
        raise RearError("There is no code at this place: click one of the coloured squares.")
    changed = edited.changed.copy()
    before, changed[position] = changed[position], code
    row, column = divmod(position, columns_of(studio.module.grid))
    where = f"row {row + 1}, column {column + 1}"
    different = int((changed != edited.codes).sum())
    return edited._replace(changed=changed), (
        f"Code {position} ({where}) was {before} and is {code} now. Changed codes: {different}."
    )


def heat_map(studio: Studio, codes: Int[np.ndarray, " N"], own: Int[np.ndarray, " N"]) -> UInt8[np.ndarray, "H W 3"]:
    """A square of colour for each code, by its number; a red frame where it is not the image's own."""
    columns = columns_of(studio.module.grid)
    rows = -(-len(codes) // columns)
    cell = max(CELL, MAP_SIDE // max(rows, columns))
    colours = matplotlib.colormaps[COLOURS](codes / max(1, studio.module.codebook_size - 1), bytes=True)[:, :3]
    sheet = np.full((rows * cell, columns * cell, 3), 255, np.uint8)
    for position, colour in enumerate(colours):
        top, left = (cell * at for at in divmod(position, columns))
        square = sheet[top : top + cell - 1, left : left + cell - 1]
        square[:] = colour
        if codes[position] != own[position]:
            square[:] = (220, 30, 30)
            square[3:-3, 3:-3] = colour
    return sheet


def columns_of(grid: tuple[int, int]) -> int:
    """Of the heat map: those of the grid, or about as many as rows where the codes are a sequence."""
    rows, columns = grid
    return columns if rows > 1 else math.ceil(math.sqrt(columns))


def position_at(studio: Studio, x: int, y: int) -> int:
    """The code at a pixel of the heat map; -1 where there is none."""
    columns = columns_of(studio.module.grid)
    rows = -(-studio.num_codes // columns)
    cell = max(CELL, MAP_SIDE // max(rows, columns))
    row, column = int(y) // cell, int(x) // cell
    position = row * columns + column
    return position if 0 <= column < columns and 0 <= position < studio.num_codes else -1


def pictures(studio: Studio, edited: Edited) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The image, its reconstruction, what the changed codes decode to, and the heat map; small ones are enlarged."""
    own, now = studio.decode(edited.codes), studio.decode(edited.changed)
    factor = max(1, SMALLEST // len(own))
    large = (one.repeat(factor, axis=0).repeat(factor, axis=1) for one in (edited.image, own, now))
    return *large, heat_map(studio, edited.changed, edited.codes)


def build(studio: Studio) -> None:
    """The tab, inside the page."""
    import gradio as gr

    most = studio.module.codebook_size - 1
    edited = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            file = gr.File(label="Image", height=130, elem_id="tokenizer_file")
            code = gr.Number(0, label="New code", info=f"0 to {most}. Click a code in the map to put it there.",
                             precision=0, minimum=0, maximum=most, elem_id="new_code")  # fmt: skip
            reset = gr.Button("Back to the image's own codes")
            status = gr.Markdown("Drop an image first.", elem_id="tokenizer_status")
        with gr.Column(scale=3):
            with gr.Row():
                image, own, now = (
                    gr.Image(label=label, interactive=False, format="png", height=290, buttons=[])
                    for label in ("Image, cropped", "Reconstruction", "With your codes")
                )
            codes = gr.Image(
                label="Codes by their number", interactive=False, format="png", height=460, elem_id="codes", buttons=[]
            )
    outputs = [edited, image, own, now, codes, status]

    def dropped(path: str | None) -> tuple:
        if not path:  # taken away
            return None, None, None, None, None, "Drop an image first."
        found = read(studio, path)
        return found, *pictures(studio, found), f"{studio.num_codes} codes of {most + 1}. Click one to replace it."

    def clicked(found: Edited | None, value: int | None, event: gr.SelectData) -> tuple:
        found, told = replace(studio, found, position_at(studio, *event.index), value)
        return found, *pictures(studio, found), told

    def back(found: Edited | None) -> tuple:
        if found is None:
            raise RearError("There are no codes yet: drop an image first.")
        found = found._replace(changed=found.codes)
        return found, *pictures(studio, found), "All codes are the image's own."

    fields.on(file.change, dropped, [file], outputs, status)
    fields.on(codes.select, clicked, [edited, code], outputs, status)
    fields.on(reset.click, back, [edited], outputs, status)
