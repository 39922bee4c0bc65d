"""Every `*.npz` in tests/goldens, and in the folder that $REAR_GOLDENS names, through the checker of its prefix."""

import importlib
import os
import pathlib

import numpy as np
import pytest

from rear_jax.runtime.precision import products_at

HERE = pathlib.Path(__file__).parent
FOLDERS = [HERE / "goldens", *map(pathlib.Path, filter(None, [os.environ.get("REAR_GOLDENS")]))]
CHECKERS = sorted((p.stem for p in (HERE / "golden_checks").glob("[!_]*.py")), key=len, reverse=True)


def checker_of(file: pathlib.Path) -> str | None:
    """The longest checker name that the file's name begins with."""
    return next((name for name in CHECKERS if file.stem.startswith(name)), None)


FILES = [file for folder in FOLDERS for file in sorted(folder.glob("*.npz")) if checker_of(file)]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_golden(file):
    checker = importlib.import_module(f"tests.golden_checks.{checker_of(file)}")
    with np.load(file) as golden, products_at("highest"):  # the authors' numbers are float32, and a GPU's are TF32
        checker.check(dict(golden))


@pytest.mark.parametrize("name", CHECKERS)
def test_every_checker_has_a_golden(name):
    assert any(checker_of(file) == name for file in FILES)
