"""Which of several state dicts in a training checkpoint is meant: the network, or a moving average of it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rear_jax.errors import RearError, one_line

log = logging.getLogger(__name__)

# What training scripts keep a state dict under. Without a choice the first one that is there counts, in another too.
NAMES = ("model", "module", "state_dict", "model_state_dict", "ema", "ema_model", "model_ema")
PREFIXES = (*NAMES, "generator", "tokenizer")  # what they put before the keys of one network among several
SETTINGS = {"model": "init_section", "tokenizer": "tokenizer_section"}  # config section of a network -> what chooses
MOST_NAMED = 8  # in a message


def state_dict(value: Any, is_tensor: Callable[[Any], bool], section: str, path: Path) -> dict[str, Any]:
    """The tensors that count of an unpickled object.

    Args:
      value: nested dicts, in which a name and the one of a dict in it are 'a.b' together.
      is_tensor: whether an entry of a dict is a tensor.
      section: name of a dict, or what the keys of a network begin with; '' = the top level if it has tensors, else the
        first of NAMES, or of NAMES in it. The log tells where there are several.
      path: how messages call the file.

    Raises RearError: there is no such section, or no tensor; what there is, is named.
    """
    found = dict(_dicts(value, is_tensor))
    known = [name for name in _ordered() if name in found]
    first = known[0] if known else ""
    if section:
        if section in found:
            return found[section]
        flat = found.get(first, {})
        return {key: flat[name] for key, name in under(flat, section, path, [name for name in found if name]).items()}
    if not known:
        raise RearError(
            f"{path} holds no state dict, at its top level or under {', '.join(NAMES)}"
            f"{_held(found, value)}; save one, or name a section."
        )
    outer = {name.partition(".")[0]: name for name in reversed(known)}
    if first and len(outer) > 1:
        told = path, ", ".join(name for name in NAMES if name in outer), first
        log.warning("%s holds the state dicts %s: taking %s. See init_section and tokenizer_section", *told)
    return found[first]


def under(keys: Iterable[str], section: str, path: Path, others: Iterable[str] = ()) -> dict[str, str]:
    """Key without the prefix of a section -> key, for all that begin with it.

    Raises RearError: there is none; `others` are sections that could be named besides.
    """
    keys, start = list(keys), f"{section}."
    if found := {key.removeprefix(start): key for key in keys if key.startswith(start)}:
        return found
    prefixes = {key.partition(".")[0] for key in keys}
    there = list(dict.fromkeys([*others, *(name for name in PREFIXES if name in prefixes)]))
    raise missing(section, path, there)


def missing(section: str, path: Path, there: Iterable[str]) -> RearError:
    """The error for a section that a file or folder does not have."""
    named = [one_line(name)[:60] for name in there][:MOST_NAMED]
    rest = f"it has {', '.join(named)}: name one of these" if named else "it has one network without a name"
    return RearError(
        f"{path} has no section {section!r:.60}; {rest}, or leave init_section and tokenizer_section empty."
    )


def _ordered() -> Iterator[str]:
    """Names of state dicts as they come where none is asked for."""
    yield ""
    for name in NAMES:
        yield name
        yield from (f"{name}.{inner}" for inner in NAMES)


def _dicts(value: Any, is_tensor: Callable[[Any], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and tensors of each dict that has any: '' is the top level, 'a' a dict there, 'a.b' one of NAMES in that.

    A dict that a pickle refers to again and again is looked through once.
    """
    looked_through: dict[int, dict[str, Any]] = {}

    def tensors(one: Any) -> dict[str, Any]:
        if id(one) not in looked_through:
            items = one.items() if isinstance(one, dict) else ()
            looked_through[id(one)] = {k: item for k, item in items if isinstance(k, str) and is_tensor(item)}
        return looked_through[id(one)]

    dicts = {"": value}
    for key, entry in value.items() if isinstance(value, dict) else ():
        if isinstance(key, str) and isinstance(entry, dict):
            dicts[key] = entry
            dicts |= {f"{key}.{inner}": entry[inner] for inner in NAMES if inner in entry}
    yield from ((name, found) for name, one in dicts.items() if (found := tensors(one)))


def _held(found: Iterable[str], value: Any) -> str:
    names = list(found) or ([str(key) for key in value] if isinstance(value, dict) else [])
    return f" (it holds {', '.join(one_line(name)[:30] for name in names[:5])})" if names else ""
