"""The experiments that come with the package: the files of `configs/`, found by name from any folder."""

import ast
import difflib
import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax.errors import RearError

PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Where the experiments are: within the installed package, or beside it in a checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


def names() -> list[str]:
    """Of all experiments, such as 'rear_l', in order."""
    return sorted(file.stem for file in folder().glob("*.py"))


def find(name_or_path: str | Path) -> Path:
    """The file of an experiment.

    Args:
      name_or_path: a name of `names()`, or a file. `configs/NAME.py` and `NAME.py`, where there are no such files, are
        those of the package.

    Raises RearError: there is none; the message names the nearest that there is.
    """
    text = str(name_or_path)
    if text in names():
        return folder() / f"{text}.py"
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.parent in (Path("configs"), Path()) and path.suffix == ".py" and path.stem in names():
        return folder() / path.name
    near = difflib.get_close_matches(path.stem, names(), 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RearError(
        f"--config={text} does not exist, and no config has this name. {hint}`rear-jax configs` lists those that there "
        "are; or give a file."
    )


def load(name_or_path: str) -> ConfigDict:
    """The settings that `get_config()` of a config file returns; what follows a colon is its argument.

    Raises RearError: there is no such file, or it has no such function; besides, whatever the file itself raises.
    """
    place, colon, argument = name_or_path.partition(":")
    file = find(place)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise RearError(f"{file} is no Python file: give a config such as configs/rear_l.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise RearError(f"{file} has no function get_config(), which returns the settings: see configs/quickstart.py.")
    made = module.get_config(argument) if colon else module.get_config()
    if not isinstance(made, ConfigDict):
        kind = type(made).__name__
        raise RearError(f"{file}: get_config() returns a {kind}: it must return rear_jax.config.default(), changed.")
    return made


def summary(name: str) -> str:
    """The first line of what an experiment says of itself."""
    said = ast.get_docstring(ast.parse((folder() / f"{name}.py").read_text())) or ""
    return said.partition("\n")[0]
