"""The page: its tabs, and the server that gives it to browsers. Nothing on it comes from elsewhere."""

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from ml_collections import ConfigDict

from rear_jax.demo import draw, exposure, tokenizer
from rear_jax.demo.studio import Studio
from rear_jax.errors import RearError

TABS = {"Draw": draw.build, "Tokenizer": tokenizer.build, "Exposure bias": exposure.build}
TITLE = "rear_jax"
FONTS, MONOSPACE = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the browser's own
STYLE = """
#drawn img, #continued img, #codes img { image-rendering: pixelated; }
[data-testid="status-tracker"] .error { display: none; }
"""  # small images have sharp pixels; an error is a sentence, and needs no mark besides
# what a browser may load: files of this server, and data inside them
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; frame-ancestors 'none'; form-action 'self'"
)
ADDRESS = re.compile(rb"https?://([^/\s\"'<>\\]*)[^\s\"'<>\\]*")  # of a site; Gradio names some as examples
MEGABYTE = 2**20
DAY, HOUR = 24 * 3600, 3600  # seconds


@contextlib.contextmanager
def served(studio: Studio, settings: ConfigDict) -> Iterator[str]:
    """The page's address, at which a server answers while the context lasts.

    Args:
      studio: the networks.
      settings: `config.demo`.

    Raises RearError: the port is taken, or there is no such host.
    """
    port = free_port(settings.host, settings.port)
    with tempfile.TemporaryDirectory(prefix="rear_jax_demo_") as folder:  # for uploads and pictures
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}  # read when it is imported
        page = build(studio, settings)
        try:
            yield _launch(page, settings, port)
        finally:
            studio.stopping.set()
            page.close(verbose=False)


def build(studio: Studio, settings: ConfigDict) -> Any:
    """The page, served nowhere yet; `settings` are `config.demo`."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, DAY), fill_width=True) as page:
        gr.Markdown(f"## {studio.title}")
        for name, build_tab in TABS.items():
            with gr.Tab(name):
                build_tab(studio)
    return page.queue(max_size=settings.queue_size, api_open=False, default_concurrency_limit=1)


def free_port(host: str, port: int) -> int:
    """The port, or for 0 one that is free; raises RearError where it is taken or the host is none of this machine."""
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise RearError(
            f"config.demo.host = {host!r}, config.demo.port = {port}: the page cannot be there ({error.strerror}): "
            "set another port, or 0 for one that is free."
        ) from error


def _launch(page: Any, settings: ConfigDict, port: int) -> str:
    """Starts the server in a thread of its own; returns the page's address."""
    import gradio as gr
    from starlette.middleware import Middleware

    _, address, _ = page.launch(
        server_name=settings.host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=settings.max_upload_megabytes * MEGABYTE,
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(font=FONTS, font_mono=MONOSPACE),
        css=STYLE,
        app_kwargs={"middleware": [Middleware(OwnFilesOnly)]},
    )
    return address


class OwnFilesOnly:
    """ASGI middleware: browsers are told to load nothing from elsewhere, and the page names no other site."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self._app = app

    async def __call__(self, scope: MutableMapping, receive: Callable, send: Callable) -> None:
        """See ASGI; only the page itself is held back until it is whole."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, parts = None, []
        own = dict(scope["headers"]).get(b"host", b"")

        async def send_checked(message: MutableMapping) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                if _is_page(message["headers"]):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                body = ADDRESS.sub(lambda found: found[0] if found[1] == own else b"", b"".join(parts))
                others = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
                await send(start | {"headers": [*others, (b"content-length", str(len(body)).encode())]})
                message = {"type": "http.response.body", "body": body}
            await send(message)

        await self._app(scope, receive, send_checked)


def _is_page(headers: list[tuple[bytes, bytes]]) -> bool:
    found = {name.lower(): value for name, value in headers}
    return found.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in found
