"""Config files, by path or by name."""

import difflib
import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from rear_jax.errors import RearError

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # as installed, and in the repository


def find(name_or_path: str) -> Path:
    """The file of an experiment: a path as it is, or 'rear_l' and 'rear_l.py' for the file of that name in configs/.

    Raises RearError: there is none; the nearest names are told.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    name = path.name.removesuffix(".py")
    known = {file.stem: file for folder in reversed(FOLDERS) for file in folder.glob("*.py") if file.stem != "__init__"}
    if path.parent == Path() and name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3, 0) or ["a file of your own"]
    raise RearError(f"there is no config {name_or_path}: give the path of a file, or a name such as {', '.join(near)}.")


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
