"""Which network a published checkpoint file holds, and its parameters in this project's form."""

import json
import logging
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rear_jax import generators, tokenizers
from rear_jax.data.sources.broken import warn_once
from rear_jax.errors import UNREADABLE, RearError
from rear_jax.runtime import places
from rear_jax.runtime.files import open_regular
from rear_jax.weights import layout, sections, shards, spliced
from rear_jax.weights.family import Family
from rear_jax.weights.views import View, view

log = logging.getLogger(__name__)

HUB_CONFIG = "config.json"
HUB_WEIGHTS = shards.NAMES
TRAINED = ("ema_model", "unwrapped_model")  # folders in a training checkpoint of 1d-tokenizer, which scores the first
PARTS = ("model.", "module.", "generator.", "tokenizer.", "ema.", "model_ema.", "ema_model.")  # in files of training


def families() -> list[Family]:
    """Every family whose files can be told apart."""
    return [*generators.FAMILIES.values(), *tokenizers.FAMILIES.values()]


def detect(tensors: Mapping[str, np.ndarray], source: str, section: str = "") -> Family:
    """The family that a state dict belongs to, by its keys.

    Of a file with several networks it is that of the largest, whose keys have the shortest prefix; or, where `section`
    is that of another kind of network which the file holds too, the family of that one.

    Raises RearError: it is none that is known here.
    """
    views = [(family, view(tensors, family.layout, source)) for family in families()]
    found = [(family, len(part.prefix)) for family, part in views if part is not None]
    wanted = [pair for pair in found if section == pair[0].SECTION] or found
    best = [family for family, length in wanted if length == min(length for _, length in wanted)]
    if len(best) != 1:
        known, first = ", ".join(f.name for f in families()), ", ".join(sorted(tensors)[:3])
        raise RearError(f"{source} is no checkpoint of a network known here ({known}); its first keys are {first}.")
    return best[0]


def open_published(place: Path, section: str = "") -> Mapping[str, np.ndarray]:
    """The tensors of a published checkpoint, see `weights_file`; each is read when it is looked up.

    Of several state dicts that training scripts write side by side, `section` names one: in a file as
    `sections.state_dict` says, in a folder one of `TRAINED`; '' = the first of these.

    Where no network known here has such keys, prefixes that training scripts write are left out: `model.` of all keys,
    or one of `PARTS` of some of them, whose tensors are then all that counts; the log tells.
    """
    path = weights_file(place) or place
    if trained := _trained(place):
        path, section = _one_of(trained, section, place), ""
    whole, wrappers = shards.open_as_written(path, section), (*shards.WRAPPERS, "model.")
    tensors = shards.unwrapped(whole, shards.WRAPPERS) or whole
    if _is_known(tensors, place):
        return tensors
    bare = shards.unwrapped(whole, wrappers)
    if bare is None or not _is_known(bare, place):
        for part in (part for start in PARTS if (part := shards.under(whole, start, wrappers)) is not None):
            if _is_known(part, place):
                others = len(whole) - len(part)
                warn_once(f"{place}: taking the {len(part)} tensors under {part.prefix!r}, leaving out {others} others")
                return part
    return bare or tensors


def _is_known(tensors: Mapping[str, np.ndarray], place: Path) -> bool:
    """Whether these are the keys of a network known here."""
    return any(view(tensors, family.layout, str(place)) for family in families())


def _trained(place: Path) -> dict[str, Path]:
    """Names of `TRAINED` -> weights in a folder of a training checkpoint, which has no config beside them."""
    if (place / HUB_CONFIG).is_file():
        return {}
    return {name: found for name in TRAINED if (found := shards.weights_in(place / name)) is not None}


def _one_of(trained: Mapping[str, Path], section: str, place: Path) -> Path:
    """The weights of a section, '' = of the first one, of which the log tells where there are others."""
    if section and section not in trained:
        raise sections.missing(section, place, trained)
    if not section and len(trained) > 1:
        taken = next(iter(trained))
        log.warning("%s holds %s: taking %s. See init_section and tokenizer_section", place, ", ".join(trained), taken)
    return trained[section] if section else next(iter(trained.values()))


def weights_file(place: Path) -> Path | None:
    """The file with the weights of a published checkpoint, None where `place` is none.

    Args:
      place: the file itself, an index of several, a folder as model hubs hand it out, with `config.json` beside the
        weights or their index, or the folder of a training checkpoint with the folders of `TRAINED`.

    Raises RearError: such a folder lacks the weights, or the file beside them; or it is a distributed checkpoint of
      PyTorch.
    """
    if place.exists() and not place.is_dir():  # a pipe is refused when it is opened
        return place
    if trained := _trained(place):
        return next(iter(trained.values()))
    found = shards.weights_in(place)
    if (place / HUB_CONFIG).is_file() and not found:
        raise RearError(f"{place} has a {HUB_CONFIG} but neither of {', '.join(HUB_WEIGHTS)}: download it again.")
    if found and not (place / HUB_CONFIG).is_file():
        raise RearError(f"{place} has no {HUB_CONFIG} beside its weights: download it too, or name {found}.")
    if not found and next(place.glob("*.distcp"), None):
        raise RearError(
            f"{place} is a distributed checkpoint of PyTorch: join it by `python -m torch.distributed.checkpoint."
            f"format_utils dcp_to_torch {place} model.pt` and give that file."
        )
    return found


def read_params(path: Path, config: ConfigDict, family: Family, shapes: Any) -> Any:
    """The parameters in a published file or hub's folder, for the config's network of a family, float32 numpy.

    Optional modules that only one of file and network has are left out (`keep_optional`); nothing else may be missing
    or spare. `shapes` are those of the network's parameters.

    Raises RearError: the file holds something else, other sizes, or not everything; each key or setting is named.
    """
    opened = _opened(path, config, family, shapes, section_of(config, family))
    kept = keep_optional(opened.family, shapes, opened.present, str(path))
    _tell_what_is_left_out(opened, kept, path)
    name, ignore = opened.family.layout.torch_name, opened.ignore
    return layout.from_torch(opened.tensors, kept, name, ignore=ignore, source=str(path))


def check_params(path: Path, config: ConfigDict, family: Family, shapes: Any) -> None:
    """Raises RearError where the header of a file tells that `read_params` will; the arguments are the same."""
    _require_fit(_opened(path, config, family, shapes, section_of(config, family)), shapes, path)


def check_original(path: Path, config: ConfigDict, family: Family, shapes: Any) -> None:
    """The same of `save_onto`."""
    _require_fit(_opened(path, config, family, shapes, ""), shapes, path)


def section_of(config: ConfigDict, family: Family) -> str:
    """The section of a training checkpoint that the config names for networks of this kind; '' = none."""
    return config[sections.SETTINGS[family.SECTION]]


def rows_of(path: Path, config: ConfigDict, family: Family, shapes: Any, parameter: str) -> int | None:
    """Rows of a table of the network in a file, from its header; None where it has none of that name.

    The arguments, and what is raised, are as of `read_params`; the rows themselves may be more or fewer.
    """
    opened = _opened(path, config, family, shapes, section_of(config, family))
    table = layout.outline(opened.tensors).get(opened.family.layout.torch_name((parameter,)).key)
    return len(table) if table is not None and table.ndim else None


def save_onto(target: Path, original: Path, config: ConfigDict, family: Family, params: Any) -> None:
    """Writes a published checkpoint anew with the parameters of one of its networks; see `spliced.save`.

    What the original does not have, such as modules that serve in training alone, is left out.

    Raises RearError: the original is missing, damaged, of other sizes, or `spliced.check` refuses.
    """
    opened = _opened(original, config, family, params, "")
    _require_fit(opened, params, original)
    kept = keep_optional(family, params, opened.present, str(original))
    written = opened.whole.names if isinstance(opened.whole, View) else dict.fromkeys(opened.whole)
    values = {}
    for key, value in layout.torch_tensors(kept, family.layout.torch_name):
        name = opened.tensors.names[key]
        values[written[name] or name] = value
    spliced.save(target, original, values)
    copied = len(opened.whole) - len(values)
    log.info("%s is %s with %d tensors of this %s; %d are copied", target, original, len(values), family.KIND, copied)


class _Opened(NamedTuple):
    """A published file.

    Attributes:
      whole: all its tensors.
      tensors: those of the network, under the keys of its layout.
      family: of the network.
      present: optional modules that the file has.
      ignore: prefixes of keys that carry nothing for the network.
    """

    whole: Mapping[str, np.ndarray]
    tensors: View
    family: Family
    present: set[str]
    ignore: tuple[str, ...]


def refuse_section(place: Path, config: ConfigDict, family: Family) -> None:
    """Raises RearError where the config names a section of a folder that a job left, which has none."""
    named = {"model": config.init_from, "tokenizer": config.tokenizer_from}[family.SECTION]
    if section_of(config, family) and named and places.place(named) == place:
        raise RearError(
            f"config.{sections.SETTINGS[family.SECTION]} is for training checkpoints of PyTorch; {place} is none: "
            "leave it empty."
        )


def _opened(path: Path, config: ConfigDict, family: Family, shapes: Any, section: str) -> _Opened:
    """Opens a section of a file for the parameters of a network.

    Raises RearError: it holds something else, or other sizes.
    """
    whole = open_published(path, section)
    found = detect(whole, str(path), family.SECTION)
    if found.SECTION != family.SECTION:
        raise RearError(f"{path} holds a {found.KIND} ({found.name}), not a {family.KIND}.")
    tensors = view(whole, found.layout, str(path))
    _require_sizes(found, layout.outline(tensors), config, path)
    optional = found.layout.optional
    present = {module for module, prefix in optional.items() if any(key.startswith(f"{prefix}.") for key in tensors)}
    spare = tuple(f"{prefix}." for module, prefix in optional.items() if module not in shapes)
    return _Opened(whole, tensors, found, present, found.layout.ignore + spare)


def _require_fit(opened: _Opened, shapes: Any, path: Path) -> None:
    kept = without_absent(opened.family, shapes, opened.present)
    name, ignore = opened.family.layout.torch_name, opened.ignore
    layout.require_fit(layout.outline(opened.tensors), kept, name, ignore=ignore, source=str(path))


def _tell_what_is_left_out(opened: _Opened, shapes: Any, path: Path) -> None:
    """Logs how much of a file is of other networks."""
    used = {opened.tensors.names.get(key) for key in layout.torch_shapes(shapes, opened.family.layout.torch_name)}
    sizes = {key: tensor.nbytes / 1e6 for key, tensor in layout.outline(opened.whole).items()}
    if spare := [size for key, size in sizes.items() if key not in used]:
        read, rest = sum(sizes.values()) - sum(spare), sum(spare)
        told = f"{path}: {len(sizes) - len(spare)} tensors ({read:.0f} MB) are of this {opened.family.KIND}"
        log.info("%s; leaving out %d others (%.0f MB)", told, len(spare), rest)


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
    except UNREADABLE as error:  # too few axes, sizes of zero
        raise RearError(
            f"{path} has tensors of shapes that no {found.name} has ({error}): it is damaged, fetch it again."
        ) from error
    if hub and (path / HUB_CONFIG).is_file():
        sizes |= _hub_sizes(hub, path / HUB_CONFIG)
    wrong = {key: size for key, size in sizes.items() if settings.get(key) != size}
    if wrong:
        name, _ = found.published_size(sizes)
        told = ", ".join(f"{key} {size!r} (config: {settings.get(key)!r})" for key, size in wrong.items())
        raise RearError(
            f"{path} is {name} with config.{found.SECTION}.{told}: use that network's config"
            f"{_flags(found.SECTION, wrong) if wrong.keys() <= {*settings} - {'name'} else ''}."
        )


def _flags(section: str, sizes: Mapping[str, Any]) -> str:
    """How a message goes on where settings of the same section are all that has to change."""
    return ", or set " + " ".join(shlex.quote(f"--config.{section}.{key}={size}") for key, size in sizes.items())


def _hub_sizes(hub: layout.Hub, path: Path) -> dict[str, Any]:
    try:
        with open_regular(path, f"There is no {path}.") as file:
            return hub.sizes(json.loads(file.read()), source=str(path))
    except (*UNREADABLE, RecursionError) as error:
        raise RearError(f"{path} is damaged ({error!r:.200}): download it again.") from error
