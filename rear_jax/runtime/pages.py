"""Pages of results: Markdown, and the same as one HTML file that can be sent or opened anywhere."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rear_jax.runtime import places
from rear_jax.runtime.atomic import atomic_file

if TYPE_CHECKING:
    from markdown_it.renderer import RendererHTML
    from markdown_it.token import Token

PICTURE = re.compile(r"\w[\w.-]*\.png", re.ASCII)  # the name of a file beside the page
LARGEST_PICTURE = 64 << 20  # bytes

# The policy lets a browser load nothing but what stands in the file itself.
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --text: #1c1e21; --back: #fff; --line: #d5d8dc; --head: #f2f3f5; --link: #0b57d0 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --text: #e4e6e8; --back: #16181b; --line: #3a3e44; --head: #22252a; --link: #8ab4f8 }}
}}
body {{ margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--text); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }}
h1, h2 {{ line-height: 1.25 }}
h2 {{ margin-top: 2rem; border-bottom: 1px solid var(--line) }}
a {{ color: var(--link) }}
img {{ max-width: 100%; height: auto; background: #fff; border-radius: 4px }}
.table {{ overflow-x: auto; overflow-wrap: normal }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .6rem; border: 1px solid var(--line); text-align: left }}
th {{ background: var(--head) }}
ul {{ padding-left: 1.2rem }}
</style>
</head>
<body>
"""
FOOT = "</body>\n</html>\n"


def save_page(path: Path, title: str, text: str) -> None:
    """Writes a page to `path` (`.md`) and, as one file with its pictures inside, to the `.html` beside it.

    Args:
      path: the Markdown file; pictures that `text` shows are PNG files in the same folder, written before.
      title: the heading; the title of the HTML page adds the name of the folder.
      text: Markdown below the heading. HTML in it is shown as text.
    """
    page = f"# {title}\n\n{text.rstrip()}\n"
    made = to_html(page, f"{title}: {path.resolve().parent.name}", path.parent)
    for file, content in ((path, page), (path.with_suffix(".html"), made)):
        with atomic_file(file) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")


def to_html(page: str, title: str, folder: Path) -> str:
    """A whole HTML document that needs no other file.

    Names of classes, prompts and files are others' text: HTML is escaped, links are those that cannot run a script,
    and a picture that is no PNG file of `folder` is left out for its caption.
    """
    from markdown_it import MarkdownIt  # here, because other jobs need not wait for it

    def image(renderer: RendererHTML, tokens: Sequence[Token], place: int, options: dict, environment: dict) -> str:
        caption = renderer.renderInlineAsText(tokens[place].children, options, environment)
        return _picture(folder, str(tokens[place].attrs["src"]), html.escape(caption))

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("image", image)
    parser.add_render_rule("table_open", lambda *_: '<div class="table">\n<table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    return HEAD.format(title=html.escape(title)) + parser.render(page) + FOOT


def _picture(folder: Path, name: str, caption: str) -> str:
    """A PNG file as an element that holds it; its caption, escaped already, where there is no such file."""
    file = folder / name
    if not PICTURE.fullmatch(name) or not file.is_file() or places.size(file) > LARGEST_PICTURE:
        return caption
    content = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{caption}" src="data:image/png;base64,{content}">'
