"""The tab 'Exposure bias': the first codes of an image are kept, and the others are drawn (reAR, arXiv 2510.04450)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rear_jax.demo import fields
from rear_jax.demo.studio import Shown, Studio
from rear_jax.metrics.codes import count_of

MEANING = (
    "The first codes of your image are kept, and the generator draws the others from there on. With few codes kept, "
    "errors of the generator add up: that is exposure bias, as in the reAR paper."
)


def continue_image(
    studio: Studio,
    file: str | None,
    share: float | None,
    text: str,
    count: int | None,
    seed: int | None,
    *sampler: float | None,
) -> Iterator[Shown]:
    """Keeps a share of an image's codes, from the front, and draws the others several times.

    The first image shown is the reconstruction from all of its own codes, the others are drawn.

    Args:
      studio: the networks.
      file: of the image.
      share: of codes that are kept, in per cent.
      text: one class by name or number, or a prompt.
      count: images to draw.
      seed: of the random numbers.
      *sampler: values of `fields.SAMPLER`.

    Raises RearError: the file is no image, a field is empty, or its value is of no use.
    """
    seed, settings = studio.settings(seed, **fields.sampler_settings(sampler))
    codes = studio.encode(studio.read_image(file))
    known, own = count_of((share or 0) / 100, studio.num_codes), studio.decode_drawn(codes)
    kept = f"{known} of {studio.num_codes} codes are the image's own."
    for shown in studio.draw(studio.wanted(text, count or 0), seed, settings, codes, known):
        captions = ["all codes are its own", *shown.captions]
        yield Shown(np.concatenate([own[None], shown.images]), captions, f"{shown.status}. {kept}")


def build(studio: Studio) -> None:
    """The tab, inside the page."""
    import gradio as gr

    gr.Markdown(MEANING)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            file = gr.File(label="Image", height=140, elem_id="exposure_file")
            share = gr.Slider(0, 100, 50, step=1, label="Codes that are kept, %", elem_id="share")
            if studio.takes_text:
                text = gr.Textbox("a photo", label="Prompt of the image")
            else:
                text = gr.Textbox(studio.name(0), label="Class of the image", info="By name or number.")
            count = gr.Number(3, label="Images", precision=0, minimum=1)
            with gr.Accordion("Sampler", open=False):
                settings = fields.seed_and_sampler(studio)
            start = gr.Button("Draw the rest", variant="primary", elem_id="continue")
        with gr.Column(scale=3):
            status = gr.Markdown("Drop an image first.", elem_id="exposure_status")
            gallery = fields.gallery("continued", height=560)

    def show(*values: Any) -> Iterator[tuple[list, str]]:
        for shown in continue_image(studio, *values):
            yield fields.in_gallery(shown), shown.status

    inputs = [file, share, text, count, *settings]
    fields.on(start.click, show, inputs, [gallery, status], status)
    fields.on(share.release, show, inputs, [gallery, status], status)
