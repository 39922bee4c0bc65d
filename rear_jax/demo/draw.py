"""The tab 'Draw': images of classes or of a prompt, shown while they are drawn."""

from collections.abc import Iterator
from typing import Any

from rear_jax.demo import fields
from rear_jax.demo.studio import Shown, Studio

FIRST_CLASSES = 4  # that the field begins with
MOST_NAMES = 20  # that stand under the field


def draw(studio: Studio, text: str, each: int | None, seed: int | None, *sampler: float | None) -> Iterator[Shown]:
    """Draws `each` images of what a text asks for.

    Args:
      studio: the networks.
      text: classes by name or number with commas between them, or a prompt.
      each: images of each class.
      seed: of the random numbers.
      *sampler: values of `fields.SAMPLER`.

    Raises RearError: a field is empty, or its value is of no use.
    """
    seed, settings = studio.settings(seed, **fields.sampler_settings(sampler))
    yield from studio.draw(studio.wanted(text, each or 0), seed, settings)


def build(studio: Studio) -> None:
    """The tab, inside the page."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            text = text_field(studio)
            label, images = ("Images", 4) if studio.takes_text else ("Images of each class", 2)
            each = gr.Number(images, label=label, precision=0, minimum=1)
            settings = fields.seed_and_sampler(studio)
            start = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Column(scale=3):
            status = gr.Markdown("Nothing is drawn yet.", elem_id="draw_status")
            gallery = fields.gallery("drawn", height=720)

    def show(*values: Any) -> Iterator[tuple[list, str]]:
        for shown in draw(studio, *values):
            yield fields.in_gallery(shown), shown.status

    fields.on(start.click, show, [text, each, *settings], [gallery, status], status)


def text_field(studio: Studio) -> Any:
    """The field for classes or a prompt."""
    import gradio as gr

    if studio.takes_text:
        prompt = studio.config.sample.prompt or "a photo of a red fox in the snow"
        return gr.Textbox(prompt, label="Prompt", lines=2, elem_id="wanted")
    most = studio.config.data.num_classes - 1
    known = f"numbers are 0 to {most}"
    if studio.names and most < MOST_NAMES:
        known = ", ".join(studio.names)
    first = ", ".join(studio.name(number) for number in range(min(FIRST_CLASSES, most + 1)))
    return gr.Textbox(
        first, label="Classes", info=f"Names or numbers, with commas between them: {known}.", elem_id="wanted"
    )
