"""The house: imports only go down, a family's name stands in its own files alone, files and functions stay short."""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rear_jax import generators, tokenizers
from tests.toy import ROOT

PACKAGE = ROOT / "rear_jax"
FLOORS = (  # the ground floor first: a module imports from lower floors, or from its own package
    {"errors", "losses", "noise", "orders", "guidance", "grpo"},
    {"runtime"},
    {"weights"},
    {"text"},
    {"generators", "tokenizers", "metrics"},
    {"config", "data"},
    {"artifacts", "experiments"},
    {"sampling"},
    {"training"},
    {"evaluation", "plan", "demo", "pipeline"},
    {"jobs"},
    {"help"},
    {"main"},
    {"__main__"},
)
LIBRARY = ("losses", "noise", "orders", "guidance", "grpo")  # what other projects import
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 80
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """Dotted name of a module."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def unit(module: str) -> str:
    """The package or top-level module that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports(file: Path) -> Iterator[str]:
    """Modules of this project that a file imports, wherever in it and for whatever purpose."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rear_jax":
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rear_jax")


@functools.cache
def strings(file: Path) -> tuple[str, ...]:
    """Every string of a file but its docstrings."""
    tree = ast.parse(file.read_text())
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, documented) and node.body)
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return tuple(node.value for node in texts if id(node) not in docstrings)


def functions(file: Path) -> Iterator[ast.FunctionDef]:
    """Every function of a file."""
    return (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))


def test_every_module_has_a_floor():
    assert {unit(module) for module in MODULES} - {""} == set().union(*FLOORS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_only_go_down(file):
    floor = {name: level for level, names in enumerate(FLOORS) for name in names} | {"": -1}
    own = unit(name_of(file)) or "main"  # rear_jax/__init__.py knows the version, and imports the door from Python late
    up = [other for other in imports(file) if unit(other) != own and floor[unit(other)] >= floor[own]]
    assert up == []


def test_no_two_modules_import_each_other():
    graph = {name_of(file): set(imports(file)) - {name_of(file)} for file in FILES}
    while leaves := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}  # what is left is on a circle


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_nothing_but_jax(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    found = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert {module.split(".")[0] for module in found} <= {"__future__", "typing", "jax"}


FAMILY_NAMES = sorted(generators.FAMILIES.keys() | tokenizers.FAMILIES.keys())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_family_is_named_in_its_own_files_alone(family):
    named = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(family)}(?![A-Za-z0-9_])")
    strangers = [file for file in FILES if family not in (file.stem, file.parent.name)]
    assert [f"{name_of(file)}: {text!r}" for file in strangers for text in strings(file) if named.search(text)] == []


def test_a_name_in_another_file_is_found(tmp_path):
    file = tmp_path / "stranger.py"
    file.write_text(
        '"""The docstring may say rar."""\n\nif model.name == "rar":\n    raise ValueError(f"not for {x} rar")\n'
    )
    assert list(strings(file)) == ["rar", "not for ", " rar"]


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_stay_short(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES
    long = {one.name for one in functions(file) if one.end_lineno - one.lineno + 1 > MOST_LINES_OF_A_FUNCTION}
    assert long - {"default"} == set()


def test_config_files_from_before_the_move_still_find_the_shared_experiments():
    old, new = (importlib.import_module(name) for name in ("rear_jax.experiments", "rear_jax.config.experiments"))
    for name in ("fashion_mnist", "llamagen_imagenet", "titok_imagenet"):
        assert getattr(old, name) is getattr(new, name)
