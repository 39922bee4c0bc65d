"""Pages of results: one HTML file with its pictures inside, whatever the names in it."""

import base64
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rear_jax.evaluation import report
from rear_jax.jobs import inspect_data
from rear_jax.runtime import figures, pages
from rear_jax.runtime.pictures import save_png
from tests import toy

VOID = {"meta", "img", "br", "hr"}
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](http://evil.example/x.png)",
    "![x](/etc/hostname)",
    "![x](../secret.png)",
    "![x](link.svg)",
    "[x](javascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "<https://good.example/a>",
    "</table></body><style>*{display:none}</style>",
    "</title>&lt;b&gt;&#60;i&#62;",
)


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the text in them, and whether all are closed."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(file.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        tag = self.open[-1] if self.open else ""
        self.texts[tag] = self.texts.get(tag, "") + data

    def all(self, tag: str) -> list[dict]:
        """The attributes of each element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def require_one_file(self) -> None:
        """Nothing runs, and nothing is loaded from elsewhere; links may lead to the web."""
        assert {tag for tag, _ in self.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
        for tag, attributes in self.elements:
            assert not any(name.startswith("on") or name == "srcset" for name in attributes)
            assert tag == "a" or "href" not in attributes
            assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
            assert attributes.get("href", "http://").startswith(("http://", "https://"))
        assert len(self.all("style")) == 1
        assert "url(" not in self.texts["style"]
        assert "@import" not in self.texts["style"]
        assert "default-src 'none'" in self.all("meta")[2]["content"]


def picture(file: Path) -> bytes:
    save_png(file, np.full((4, 6, 3), 90, np.uint8))
    return file.read_bytes()


def test_a_page_holds_its_pictures_tables_and_title(tmp_path):
    content = picture(tmp_path / "curves_train.png")
    text = figures.table(["images", "FID"], [["samples", "1.5"]]) + "\n\n![Some *curves*](curves_train.png)\n"
    pages.save_page(tmp_path / "report.md", "Report", text)
    assert (tmp_path / "report.md").read_text() == f"# Report\n\n{text}"
    page = Page(tmp_path / "report.html")
    page.require_one_file()
    assert page.texts["title"] == f"Report: {tmp_path.name}"
    assert page.texts["h1"] == "Report"
    assert (page.texts["th"], page.texts["td"]) == ("imagesFID", "samples1.5")
    (shown,) = page.all("img")
    assert shown["alt"] == "Some curves"
    assert base64.b64decode(shown["src"].partition(",")[2]) == content
    assert page.all("meta")[1] == {"name": "viewport", "content": "width=device-width, initial-scale=1"}
    assert "prefers-color-scheme: dark" in page.texts["style"]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_others_wrote_runs_nothing_and_loads_nothing(name, tmp_path):
    folder = tmp_path / "a&<b>"
    folder.mkdir()
    picture(tmp_path / "secret.png")
    (folder / "link.svg").symlink_to(tmp_path / "secret.png")
    rows = [[name.replace("|", "\\|"), "1"]]
    pages.save_page(folder / "report.md", name, f"{name}\n\n- {name}\n\n{figures.table(['class', 'images'], rows)}")
    page = Page(folder / "report.html")
    page.require_one_file()
    assert page.all("img") == []
    assert [len(page.all(tag)) for tag in ("h1", "li", "table", "td")] == [1, 1, 1, 2]
    assert "onerror" not in {key for _, attributes in page.elements for key in attributes}


def test_a_picture_that_is_too_large_is_named_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "LARGEST_PICTURE", len(picture(tmp_path / "sheet.png")) - 1)
    assert "<p>A sheet</p>" in pages.to_html("![A sheet](sheet.png)", "title", tmp_path)


def test_names_that_are_no_unicode_are_escaped(tmp_path):
    pages.save_page(tmp_path / "inspect.md", "Images", "photo\udcff.png")
    for file in ("inspect.md", "inspect.html"):
        assert "photo\\udcff.png" in (tmp_path / file).read_text()


def test_a_value_of_a_recipe_stays_in_its_line(tmp_path):
    (line,) = report.recipe_lines({"prompt": "a dress\n\n# A title\x1b[0m"})
    assert line == "- prompt: a dress # A title\\x1b[0m"


def test_the_report_is_one_file(tmp_path):
    for name in report.PICTURES:
        picture(tmp_path / name)
    result = {
        "scores": {"samples": {"FD": 2.0, "shoe <b>": 0.5}, "held-out": {"FD": 1.0}},
        "recipe": {"network": "EfficientNet", "samples": {"prompts": "<script>alert(1)</script>"}},
    }
    report.write(tmp_path, result)
    page = Page(tmp_path / "report.html")
    page.require_one_file()
    assert len(page.all("img")) == len(report.PICTURES)
    assert len(page.all("tr")) == 3
    assert "shoe <b>" in page.texts["th"]
    assert "samples: prompts: <script>alert(1)</script>" in page.texts["li"]


def test_a_hostile_class_name_is_text_in_the_page_of_the_images(tmp_path):
    for name in ("<script>alert(1)<", "shirt"):  # a folder's name has no slash
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        picture(folder / "1.png")
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    changes = {"source": "folder", "path": str(tmp_path / "photos"), "train_split": "train", "eval_split": "train"}
    inspect_data.run(toy.config(**{f"data__{key}": value for key, value in changes.items()}), workdir)
    page = Page(workdir / "inspect.html")
    page.require_one_file()
    assert len(page.all("img")) == 1
    assert "<script>alert(1)<" in page.texts["td"]
