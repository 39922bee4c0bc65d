"""The guides as a site: every page is in the navigation, links lead to pages, and the settings are all there.

`.ci/docs` builds the site itself, with every warning as an error.
"""

import importlib.util
import re

import pytest
import yaml

from rear_jax import generators, tokenizers
from rear_jax.config import default
from rear_jax.config.ranges import ALLOWED, leaves
from tests.toy import ROOT

_SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hooks)


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, in which a tag names a function."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


@pytest.fixture(scope="module")
def site() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def pages(navigation) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    entries = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for entry in entries for page in pages(entry)]


def test_every_page_is_in_the_navigation_once(site):
    written = [str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages(site["nav"])) == sorted([*written, *hooks.ELSEWHERE.values(), hooks.SETTINGS])


def test_every_page_of_benchmarks_and_launch_is_there():
    outside = {str(file.relative_to(ROOT)) for name in ("benchmarks", "launch") for file in (ROOT / name).glob("*.md")}
    assert set(hooks.ELSEWHERE) == outside | {"README.md"}


def test_no_fonts_or_analytics_of_others(site):
    assert site["theme"]["font"] is False
    assert not {"extra", "extra_javascript", "extra_css"} & set(site)


@pytest.mark.parametrize(
    ("page", "link", "on_site"),
    [
        ("index.md", "[a](docs/images.md#imagenet)", "[a](images.md#imagenet)"),
        ("index.md", "![a](docs/samples.png)", "![a](samples.png)"),
        ("index.md", "[a](launch/README.md)", "[a](launch.md)"),
        ("index.md", "[`a`](rear_jax/losses.py)", "`a`"),
        ("index.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("index.md", "[a](#jobs)", "[a](#jobs)"),
        ("scores.md", "[a](../README.md#jobs)", "[a](index.md#jobs)"),
        ("scores.md", "[a](../rear_jax/config/data.py)", "[a](settings.md)"),
        ("launch.md", "[a](../docs/images.md)", "[a](images.md)"),
        ("launch.md", "[`tpu.sh`](tpu.sh)", "`tpu.sh`"),
        ("benchmarks/PLAN.md", "[a](../docs/images.md) [b](TPU.md)", "[a](../images.md) [b](TPU.md)"),
    ],
)
def test_links(page, link, on_site):
    assert hooks.for_site(link, page) == on_site


def test_every_setting_is_on_the_page_with_its_default_and_range():
    entries = [line for line in hooks.settings_page().splitlines() if line.startswith("- `")]
    told = {entry.split(" = ")[0].removeprefix("- `"): entry for entry in entries}
    for key, (section, name) in leaves(default()):
        if not key.startswith(("model.", "tokenizer.")):
            first, *meaning, allowed = told[key].split("<br>")
            assert first == f"- `{key} = {section[name]!r}`"
            assert meaning or key.startswith("text."), key
            assert allowed == f"*Range: {ALLOWED[key].words}.*"


def test_nothing_on_the_page_of_settings_reads_as_html():
    plain = re.sub(r"`[^`]*`|<br>", "", hooks.settings_page())
    assert re.findall(r"<\w+", plain) == []


def test_every_setting_of_a_family_is_explained():
    unexplained = []
    for kind, families in (("model", generators.FAMILIES), ("tokenizer", tokenizers.FAMILIES)):
        for family in families.values():
            said = dict(hooks._attributes(family.network))
            unexplained += [f"{kind}: {family.name}.{key}" for key in family.section() if key not in {*said, "name"}]
    assert unexplained == []
