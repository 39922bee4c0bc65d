"""Which network a published checkpoint file holds, and its parameters in this project's form."""

import json
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.errors import RearError
from rear_jax.weights import layout
from rear_jax.weights.family import Family
from rear_jax.weights.torch_files import read_tensors

log = logging.getLogger(__name__)

HUB_CONFIG = "config.json"
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def families() -> list[Family]:
    """Every family whose files can be told apart."""
    return [*generators.FAMILIES.values(), *tokenizers.FAMILIES.values()]


def detect(tensors: Mapping[str, np.ndarray], source: str) -> Family:
    """The family that a state dict belongs to, by its keys.

    Raises RearError: it is none that is known here.
    """
    found = [f for f in families() if any(re.fullmatch(f.layout.signature, key) for key in tensors)]
    if len(found) != 1:
        known, first = ", ".join(f.name for f in families()), ", ".join(sorted(tensors)[:3])
        raise RearError(f"{source} is no checkpoint of a network known here ({known}); its first keys are {first}.")
    return found[0]


def weights_file(place: Path) -> Path | None:
    """The file with the weights of a published checkpoint, None where `place` is none.

    Args:
      place: the file itself, or a folder as model hubs hand it out, with `config.json` beside the weights.

    Raises RearError: such a folder lacks the weights.
    """
    if place.is_file():
        return place
    if not (place / HUB_CONFIG).is_file():
        return None
    found = [place / name for name in HUB_WEIGHTS if (place / name).is_file()]
    if not found:
        raise RearError(f"{place} has a {HUB_CONFIG} but neither of {', '.join(HUB_WEIGHTS)}: download it again.")
    return found[0]


def read_params(path: Path, config: ConfigDict, family: Family, shapes: Any) -> Any:
    """The parameters in a published file or hub's folder, for the config's network of a family, float32 numpy.

    Optional modules that only one of file and network has are left out (`keep_optional`); nothing else may be missing
    or spare. `shapes` are those of the network's parameters.

    Raises RearError: the file holds something else, other sizes, or not everything; each key or setting is named.
    """
    tensors, found, present, ignore = _opened(path, config, family, shapes)
    kept = keep_optional(found, shapes, present, str(path))
    return layout.from_torch(tensors, kept, found.layout.torch_name, ignore=ignore, source=str(path))


def check_params(path: Path, config: ConfigDict, family: Family, shapes: Any) -> None:
    """Raises RearError where the header of a file tells that `read_params` will; the arguments are the same."""
    tensors, found, present, ignore = _opened(path, config, family, shapes)
    kept = without_absent(found, shapes, present)
    layout.require_fit(layout.outline(tensors), kept, found.layout.torch_name, ignore=ignore, source=str(path))


def _opened(
    path: Path, config: ConfigDict, family: Family, shapes: Any
) -> tuple[Mapping[str, np.ndarray], Family, set[str], tuple[str, ...]]:
    """The file's tensors, family and optional modules, and the prefixes of keys that carry nothing for the network.

    Raises RearError: the file holds something else, or other sizes.
    """
    tensors = read_tensors(weights_file(path) or path)
    found = detect(tensors, str(path))
    if found.SECTION != family.SECTION:
        raise RearError(f"{path} holds a {found.KIND} ({found.name}), not a {family.KIND}.")
    _require_sizes(found, layout.outline(tensors), config, path)
    optional = found.layout.optional
    present = {module for module, prefix in optional.items() if any(key.startswith(f"{prefix}.") for key in tensors)}
    spare = tuple(f"{prefix}." for module, prefix in optional.items() if module not in shapes)
    return tensors, found, present, found.layout.ignore + spare


def without_absent(family: Family, shapes: Mapping[str, Any], present: Collection[str]) -> dict[str, Any]:
    """The modules of `shapes` without the optional ones that are not `present` in a source."""
    return {name: tree for name, tree in shapes.items() if name not in family.layout.optional or name in present}


def keep_optional(family: Family, shapes: Mapping[str, Any], present: Collection[str], source: str) -> dict[str, Any]:
    """`without_absent`, for the reading of a source.

    Optional are modules that serve in training alone (reAR's projectors). A source without them can be trained further
    by a method that has them, which then starts them afresh; a source with them serves a method that has none. The
    log tells.
    """
    optional: Iterable[str] = family.layout.optional
    absent = [module for module in optional if module in shapes and module not in present]
    spare = [module for module in optional if module in present and module not in shapes]
    if absent:
        log.info("%s has no %s, which serves in training alone", source, " and no ".join(absent))
    if spare:
        log.info("%s: leaving out %s, which this method does not use", source, " and ".join(spare))
    return without_absent(family, shapes, present)


def _require_sizes(found: Family, tensors: Mapping[str, np.ndarray], config: ConfigDict, path: Path) -> None:
    """Raises RearError unless the config describes the network in the file."""
    settings, hub = config[found.SECTION], found.layout.hub
    try:
        sizes = {"name": found.name} | found.layout.sizes(tensors)
    except KeyError as missing:
        raise RearError(
            f"{path} has no tensor {missing}: it is not a whole {found.name} checkpoint. Give such a file, or the "
            "config of the network that this one holds."
        ) from missing
    if hub and (path / HUB_CONFIG).is_file():
        sizes |= hub.sizes(_read_json(path / HUB_CONFIG), source=str(path / HUB_CONFIG))
    wrong = [
        f"{key} {size!r} (config: {settings.get(key)!r})" for key, size in sizes.items() if settings.get(key) != size
    ]
    if wrong:
        name, _ = found.published_size(sizes)
        raise RearError(f"{path} is {name} with config.{found.SECTION}.{', '.join(wrong)}: use that network's config.")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise RearError(f"{path} is damaged ({error}): download it again.") from error
