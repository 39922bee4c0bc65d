"""The documents: their commands can be typed, their links and paths lead somewhere, their sentences are short."""

import copy
import itertools
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from rear_jax import jobs, main
from rear_jax.config import default, files
from tests.test_architecture import FLOORS
from tests.toy import ROOT

MOST_WORDS = 25  # of a sentence
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
TEXTS = [*GUIDES, *sorted((ROOT / "benchmarks").glob("*.md"))]
COMMAND = re.compile(
    r"(?<![\w./])(?:python -m rear_jax\.main|rear-jax(?= --config=)|launch/\w+\.sh(?= [^\n`]* -- ))[^\n`]*"
)
PATH = re.compile(r"(?<![\w./:])(?:rear_jax|configs|tests|benchmarks|launch|docs|\.ci)/[\w./{},*-]*")
LINK = re.compile(r"\]\(([^()\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILES = (".md", ".html", ".json", ".py", ".npz", ".png", ".jsonl", ".txt", ".zip", ".tar")


def relative(file: Path) -> str:
    """A file as the test's name tells it."""
    return str(file.relative_to(ROOT))


def found(pattern: re.Pattern, files: list[Path]) -> list:
    """A test case for each match in files, lines that end with a backslash joined; it is named by its file."""
    texts = {file: re.sub(r"\\\n\s*", " ", file.read_text()) for file in files}
    return [
        pytest.param(match[0].strip(), id=f"{relative(file)}: {match[0].strip()}")
        for file, text in texts.items()
        for match in pattern.finditer(text)
    ]


def arguments_of(command: str) -> list[str]:
    """What a shell gives to `rear_jax.main`, from its own command or from one of launch/."""
    words = shlex.split(command, comments=True)
    start = 3 if words[0] == "python" else 1 if words[0] == "rear-jax" else words.index("--") + 1
    end = next((place for place, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
    return words[start:end]


def parse(arguments: list[str]) -> flags.FlagValues:
    """The flags of `rear_jax.main`, read as it reads them.

    Raises:
      AttributeError, KeyError or flags.Error: a flag or setting does not exist, or a value does not fit it.
    """
    values, words = flags.FlagValues(), [main.__name__, *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
    for flag in flags.FLAGS.flags_by_module_dict()[main.__name__]:
        if flag.name != "config":
            flags.DEFINE_flag(copy.deepcopy(flag), values)
    assert values(words) == words[:1], "words that belong to no flag"
    return values


@pytest.mark.parametrize("command", found(COMMAND, GUIDES))
def test_commands_can_be_typed(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = arguments_of(command)
    config = next((word.removeprefix("--config=") for word in arguments if word.startswith("--config=")), "")
    name = config.partition(":")[0]
    assert re.fullmatch(r"configs/\w+\.py", name) or name in files.names()
    found_there = [word.replace(f"={config}", f"={files.find(name)}{config[len(name) :]}") for word in arguments]
    values = parse(found_there)
    assert values.workdir
    assert set(values.job or values.config.jobs) <= set(jobs.JOBS)


def test_no_command_is_left_out():
    for file in GUIDES:
        assert file.read_text().count("python -m rear_jax.main") == sum(
            case.values[0].startswith("python") for case in found(COMMAND, [file])
        )


@pytest.mark.parametrize("flag", found(re.compile(r"(?<=`)--config\.[a-z][^=`\n]*=[^`\n]*(?=`)"), TEXTS))
def test_settings_in_the_text_can_be_typed(flag, monkeypatch):
    monkeypatch.chdir(ROOT)
    parse(["--config=configs/rear_b.py", "--workdir=DIR", *shlex.split(flag)])


@pytest.mark.parametrize("file", [file for file in TEXTS if file.name != "extending.md"], ids=relative)
def test_dotted_settings_exist(file):
    known = default()
    unknown = []
    for span in SPAN.findall(file.read_text()):
        dotted = re.fullmatch(r"(?:--)?(?:config\.)?([a-z_]+(?:\.[a-z_0-9]+)+)(?: ?=.*)?", span)
        if dotted and dotted[1].partition(".")[0] in known and not dotted[1].endswith(FILES):
            parent, _, leaf = dotted[1].rpartition(".")
            section = known
            for key in parent.split("."):
                section = section.get(key, {})
            unknown += [] if leaf in section else [span]
    assert unknown == []


@pytest.mark.parametrize("command", ["--config.seeed=1", "--config.seed=one", "--config.mesh=3", "--jobs=train", "x"])
def test_commands_that_are_wrong_are_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AttributeError, KeyError, TypeError, AssertionError, flags.Error)):
        parse(["--config=configs/rear_b.py", "--workdir=DIR", command])


def expanded(path: str) -> list[str]:
    """'a{b,c}' -> 'ab', 'ac'."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if not braces:
        return [path]
    return [one for part in braces[1].split(",") for one in expanded(path.replace(braces[0], part, 1))]


@pytest.mark.parametrize("file", TEXTS, ids=relative)
def test_paths_lead_somewhere(file):
    paths = [one for path in PATH.findall(file.read_text()) for one in expanded(path.rstrip(".,"))]
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def headings(file: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", TEXTS, ids=relative)
def test_links_lead_somewhere(file):
    broken = []
    for link in LINK.findall(file.read_text()):
        if re.match(r"\w+:", link):  # the web
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or not target.is_relative_to(ROOT) or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


def test_the_tree_of_folders_is_the_one_on_disk():
    (tree,) = re.findall(r"^rear_jax/\n((?:  .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    names = [name for line in tree.splitlines() for name in re.split(r"\s{2,}", line.strip())[0].split()]
    assert [name for name in names if not (ROOT / "rear_jax" / name).exists()] == []
    folders = {file.parent.name for file in (ROOT / "rear_jax").glob("*/__init__.py")}
    assert folders == {name.rstrip("/") for name in names if name.endswith("/")}


def test_the_readme_tells_the_floors_as_they_are():
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("`main.py` → ")]
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    levels = [[floor[name] for name in re.findall(r"`(\w+)(?:/|\.py)`", part)] for part in line.split("→")]
    assert all(min(upper) > max(lower) for upper, lower in itertools.pairwise(levels))
    packages = {file.parent.name for file in (ROOT / "rear_jax").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"`(\w+)/`", line))


def sentences(text: str) -> list[str]:
    """What is left of Markdown as prose: no code, tables or headings; a span of code is a word, a link its text."""
    text = re.sub(r"^( *)```.*?^ *```$", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(\n\n)(?: {4}.*(?:\n|$))+", r"\1", text)
    text = re.sub(r"^(?:#+ | *\|).*$", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*+]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]+`", "CODE", text)
    text = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n", text.replace("*", ""))
    return [one.strip() for block in blocks for one in re.split(r"[.!?][\"')]*(?:\s+|$)", block) if one.strip()]


def words(sentence: str) -> int:
    """How many there are; signs alone are none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("file", TEXTS, ids=relative)
def test_sentences_are_short(file):
    long = {one: words(one) for one in sentences(file.read_text())}
    assert {one: count for one, count in long.items() if count > MOST_WORDS} == {}


def test_sentences_are_told_apart():
    text = "# A title\n\nOne `two three` [four\nfive](six.md). Seven *eight*!\n\n- nine 1.5 = ten\n- x\n\n| cell |\n"
    assert [words(one) for one in sentences(text + "\n```sh\nnot this\n```\nlast")] == [4, 2, 3, 1, 1]
