"""The notebooks: they hold no outputs, are made of small cells and short sentences, and run from beginning to end."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from tests.test_docs import MOST_WORDS, sentences, words
from tests.toy import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MOST_LINES = 32  # of a cell
MOST_LINES_OF_A_MODEL = 60
LONGEST = 900  # seconds that one cell may take

pytestmark = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells(file: Path, kind: str) -> list[nbformat.NotebookNode]:
    """The cells of a kind, 'code' or 'markdown'."""
    return [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == kind]


def test_no_outputs_are_kept(file):
    """`jupyter nbconvert --clear-output --inplace docs/notebooks/*.ipynb` removes them."""
    nbformat.validate(nbformat.read(file, as_version=4))
    code = cells(file, "code")
    assert [cell.id for cell in code if cell.outputs or cell.execution_count is not None] == []
    assert {key for cell in code for key in cell.metadata} <= {"tags"}


def test_one_cell_has_the_parameters(file):
    (cell,) = [cell for cell in cells(file, "code") if "parameters" in cell.metadata.get("tags", ())]
    assert "REAR_NOTEBOOK_TOY" in cell.source


def test_it_installs_first_and_then_shows_the_devices(file):
    first, second = cells(file, "code")[:2]
    assert '"pip", "install"' in first.source
    assert "jax" not in {node.names[0].name for node in ast.walk(ast.parse(first.source)) if hasattr(node, "names")}
    assert "jax.devices()" in second.source


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("", None),
        ("/content/rear_jax-1-py3-none-any.whl", "/content/rear_jax-1-py3-none-any.whl"),
        ("git+https://example.org/rear_jax", "rear-jax @ git+https://example.org/rear_jax"),
    ],
)
def test_it_installs_from_where_it_is_told(file, source, asked, tmp_path, monkeypatch):
    """Outside a checkout; nobody is sent to an address that this project does not know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rear_jax" else name)
    monkeypatch.setattr("shutil.which", lambda _: None)
    ran = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: ran.append(command[-1]))
    first = cells(file, "code")[0].source.replace('SOURCE = ""', f"SOURCE = {source!r}")
    if asked is None:
        with pytest.raises(SystemExit, match="Fill in SOURCE"):
            exec(first, {})
    else:
        exec(first, {})
    assert ran == ([asked] if asked else [])


def test_cells_are_small_and_sentences_short(file):
    assert [cell.id for cell in cells(file, "code") if len(cell.source.splitlines()) > MOST_LINES] == []
    for cell in cells(file, "markdown"):
        assert [one for one in sentences(cell.source) if words(one) > MOST_WORDS] == []


def test_a_model_takes_at_most_sixty_lines(file):
    for cell in cells(file, "code"):
        classes = [node for node in ast.parse(cell.source).body if isinstance(node, ast.ClassDef)]
        assert sum(node.end_lineno - node.lineno + 1 for node in classes) <= MOST_LINES_OF_A_MODEL


def test_the_notebooks_it_names_exist(file):
    text = "\n".join(cell.source for cell in cells(file, "markdown"))
    named = re.findall(r"`(\w+\.ipynb)`", text)
    assert [name for name in named if not (file.parent / name).exists()] == []


@pytest.mark.slow
def test_it_runs(file, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("REAR_NOTEBOOK_TOY", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    book = nbformat.read(file, as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace("/tmp/rear_jax_quickstart", str(tmp_path / "run"))
    NotebookClient(book, timeout=LONGEST, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
