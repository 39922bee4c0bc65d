"""What MkDocs builds besides the pages of this folder: pages from other folders, and the reference of all settings.

On a code host, links between pages are paths in the repository. Here they become those of the site. A link to a file
that is no page loses its target and keeps its text.
"""

import inspect
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rear_jax import generators, help, tokenizers
from rear_jax.config import default

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # page of the repository -> page of the site
    "README.md": "index.md",
    "launch/README.md": "launch.md",
    **{f"benchmarks/{name}.md": f"benchmarks/{name}.md" for name in ("PLAN", "RESULTS", "TPU")},
}
SETTINGS = "settings.md"
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^()\s]+)\)|(?<=\]\()()([^()\s]+)(?=\))")  # a link, or the place of an image
FAMILIES = {"model": generators.FAMILIES, "tokenizer": tokenizers.FAMILIES}
ATTRIBUTE = re.compile(r"^  (\w[\w, ]*): (.*(?:\n {4}.*)*)", re.MULTILINE)  # names, and what a docstring says of them


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in this folder."""
    from mkdocs.structure.files import File

    made = {page: (ROOT / file).read_text() for file, page in ELSEWHERE.items()} | {SETTINGS: settings_page()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turns the links of a page into those of the site."""
    return for_site(markdown, page.file.src_uri)


def for_site(markdown: str, page: str) -> str:
    """The text of a page of the site, by its path there, with links that lead to pages of the site."""
    homes = {site: file for file, site in ELSEWHERE.items()}
    folder = posixpath.dirname(homes.get(page, f"docs/{page}"))

    def moved(link: re.Match) -> str:
        text, target = (link[1], link[2]) if link[2] else (None, link[4])
        if re.match(r"\w+:|#", target):
            return link[0]
        path, mark, anchor = target.partition("#")
        place = _on_site(posixpath.normpath(posixpath.join(folder, path)))
        if place is None:
            return link[0] if text is None else text
        there = posixpath.relpath(place, posixpath.dirname(page) or ".") + mark + anchor
        return there if text is None else f"[{text}]({there})"

    return LINK.sub(moved, markdown)


def _on_site(path: str) -> str | None:
    """The place on the site of a path in the repository, None where it has none."""
    if path == "rear_jax/config" or path.startswith("rear_jax/config/"):
        return SETTINGS
    inside = path.removeprefix("docs/") if path.startswith("docs/") and not path.endswith(".py") else None
    return ELSEWHERE.get(path, inside)


def settings_page() -> str:
    """Every setting with its default, what it means, and its range: a list for each section."""
    lines = [
        "# Settings",
        "Write a setting behind `--config.` on the command line, such as `--config.train.loop.steps=1000`. "
        "Or set it in a config file. This page is made from `rear_jax/config`.",
        "The sections `model` and `tokenizer` belong to families of networks. Each family has its own list.",
    ]
    config, sections = default(), {}
    for setting in help.described(config):
        sections.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    for name, settings in sorted(sections.items()):
        if name in FAMILIES:
            for family in FAMILIES[name].values():
                lines += [f"## `{name}`: {family.name}", *_of_family(name, family)]
        else:
            lines += [f"## `{name}`" if name else "## General", _list(settings)]
    return "\n\n".join(lines) + "\n"


def _of_family(section: str, family: Any) -> Iterator[str]:
    """What a family is, and its settings, as the docstrings of its network tell them."""
    config = default()
    with config.unlocked():
        config[section] = family.section()
    said = dict(_attributes(family.network))
    yield inspect.getdoc(family.network).partition("\n\n")[0].replace("\n", " ")
    found = [one for one in help.described(config) if one.key.startswith(f"{section}.")]
    yield _list(one._replace(said=said.get(one.key.rpartition(".")[2], "")) for one in found)


def _attributes(network: type) -> Iterator[tuple[str, str]]:
    """(attribute, what the docstring of the network or of a class above it says of it)."""
    for cls in reversed(network.__mro__):
        _, _, listed = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
        for names, text in ATTRIBUTE.findall(listed):
            for name in names.split(", "):
                yield name, " ".join(text.split())


def _list(settings: Iterable[help.Setting]) -> str:
    lines = []
    for one in settings:
        words = [text for text in (one.said, f"*Range: {one.allowed}.*" if one.allowed else "") if text]
        told = "<br>".join(words).replace("<workdir>", "`<workdir>`")
        lines.append(f"- `{one.key} = {one.value!r}`<br>{told}")
    return "\n".join(lines)
