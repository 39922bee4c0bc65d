"""Fields that several tabs have, and how a tab's function becomes an event of the page."""

import functools
import html
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from jax.errors import JaxRuntimeError

from rear_jax.demo.studio import Shown, Studio
from rear_jax.errors import RearError

log = logging.getLogger(__name__)

DEVICES = "devices"  # events that compute: one of them runs, the others wait
SLIDERS = {  # numbers of `config.sample` -> label, and the slider's ends and step
    "guidance_scale": ("Guidance scale", {"minimum": 0.0, "maximum": 20.0, "step": 0.1}),
    "guidance_power": ("Guidance power", {"minimum": 0.0, "maximum": 5.0, "step": 0.05}),
    "temperature": ("Temperature", {"minimum": 0.0, "maximum": 3.0, "step": 0.01}),
    "top_p": ("Top-p (1 = off)", {"minimum": 0.01, "maximum": 1.0, "step": 0.01}),
}
SAMPLER = (*SLIDERS, "top_k")  # the order in which the functions of the tabs take them


def sampler_settings(values: Sequence[float | None]) -> dict[str, float | None]:
    """Values of `SAMPLER` by name; a slider gives a whole number where its value is one."""
    return {
        name: float(value) if name in SLIDERS and isinstance(value, int) else value
        for name, value in zip(SAMPLER, values, strict=True)
    }


def gallery(name: str, *, height: int) -> Any:
    """Where drawn images are shown; `name` is its id on the page, the height is in pixels."""
    import gradio as gr

    shape = {"columns": 4, "object_fit": "contain", "height": height}
    return gr.Gallery(label="Images", show_label=False, format="png", elem_id=name, **shape)


def in_gallery(shown: Shown) -> list[tuple[Any, str]]:
    """The images, each with its caption."""
    return list(zip(shown.images, shown.captions, strict=True))


def seed_and_sampler(studio: Studio) -> list[Any]:
    """The fields for the seed and for `SAMPLER`, as the config sets them."""
    import gradio as gr

    settings = studio.config.sample
    seed = gr.Number(studio.config.seed, label="Seed", precision=0, minimum=0)
    sliders = [gr.Slider(value=settings[name], label=label, **ends) for name, (label, ends) in SLIDERS.items()]
    return [seed, *sliders, gr.Number(settings.top_k, label="Top-k (0 = off)", precision=0, minimum=0)]


def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, status: Any) -> None:
    """Calls a function, or goes through a generator, when the event happens.

    One runs at a time. Who waits sees it at `status`, and the pictures on the way stay in sight.
    """
    one_at_a_time = {"concurrency_id": DEVICES, "concurrency_limit": 1, "api_visibility": "private"}
    event(told(function), inputs, outputs, show_progress="minimal", show_progress_on=status, **one_at_a_time)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function or generator, whose errors are one sentence on the page."""
    import gradio as gr

    def failure(error: Exception) -> Exception:
        return gr.Error(sentence(error), duration=None, title="", print_exception=False)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise failure(error) from None

    @functools.wraps(function)
    def go_through(*arguments: Any) -> Any:
        try:
            yield from function(*arguments)
        except Exception as error:
            raise failure(error) from None

    return go_through if inspect.isgeneratorfunction(function) else call


def sentence(error: Exception) -> str:
    """What the page says of an error, as HTML; what is no fault of the user's goes to the log."""
    if isinstance(error, RearError):
        return html.escape(str(error))
    if isinstance(error, JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED"):
        return "The devices have too little memory: start the demo with a smaller config.demo.batch_size."
    log.error("demo: an error that is no fault of the user's", exc_info=error)
    return "This is a fault of the program: log.txt in the workdir tells more."
