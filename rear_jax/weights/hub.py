"""Files of the Hugging Face hub, by names such as `hf://owner/repo/file`, in the cache of its own library.

`hf://owner/repo@revision/file` is a file at a branch, tag or commit; `hf://owner/repo` and `hf://owner/repo/folder` are
the weights in a folder, with the small files beside them. The library reads HF_ENDPOINT, HF_HOME, HF_TOKEN and
HF_HUB_OFFLINE. It is imported, and the network used, for such a name alone.
"""

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple

from rear_jax.errors import RearError, one_line
from rear_jax.weights import shards

log = logging.getLogger(__name__)

SCHEME = "hf://"
FORM = "hf://owner/repo/file or hf://owner/repo, with @revision behind the repo if it is not the newest"
NAME = r"[A-Za-z0-9][\w.-]*"
REFERENCE = re.compile(rf"hf://({NAME}/{NAME})(?:@([^/@\s]+))?(?:/([^\\]*?))?/?")
SMALL = (".json", ".txt", ".model", ".gz")  # beside weights: the network's settings and its vocabulary
VOCABULARIES = ("config.json", "tokenizer.json", "vocab.json", "spiece.model")  # one of them is in any folder


class Reference(NamedTuple):
    """What a name stands for: `path` is that of a file or folder in `repo`, '' for the whole of it."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{'/' if self.path else ''}{self.path}"


def parsed(name: str) -> Reference | None:
    """The parts of a name; None where it is none of the right form."""
    found = REFERENCE.fullmatch(name)
    if not found or {"", ".", ".."} & set((found[3] or "x").split("/")):
        return None
    return Reference(found[1], found[2], found[3] or "")


@functools.cache
def fetched(name: str) -> Path:
    """The file or folder of a name, downloaded unless it is in the cache; a process asks once for each.

    Without a network it is what the cache has.

    Raises RearError: the name has another form, the library is not installed, there is no such repository, revision or
      file, or the hub cannot be reached and the cache has nothing.
    """
    reference = parsed(name)
    if reference is None:
        raise RearError(f"{name} is no name of the hub: give {FORM}.")
    library = _library(name)
    place = _asked(reference, library, lambda: _file_or_folder(reference, library))
    log.info("%s is %s", name, place)
    return place


def _library(name: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise RearError(f"{name} needs the library of the hub: pip install 'rear-jax[hub]', or name a file.") from error
    return huggingface_hub


def _asked(reference: Reference, library: ModuleType, ask: Callable[[], Path]) -> Path:
    """What the hub answers; what it refuses is one line."""
    errors, repo = library.errors, reference.repo
    try:
        return ask()
    except errors.GatedRepoError as error:
        raise RearError(f"{reference}: {repo} is gated: accept its terms on its page, and set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise RearError(f"{reference}: there is no {repo}: mend the name; if it is private, set HF_TOKEN.") from error
    except errors.RevisionNotFoundError as error:
        raise RearError(f"{reference}: {repo} has no revision {reference.revision}: mend it.") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(reference, "the hub cannot be reached, and the cache does not have it") from error
    except errors.EntryNotFoundError as error:
        what = reference.path or "weights, settings or vocabulary"
        raise RearError(f"{reference}: {repo} has no {what}: mend the name.") from error
    except (OSError, ValueError, errors.HTTPError) as error:
        raise _unreachable(reference, one_line(str(error))[:200]) from error


def _unreachable(reference: Reference, why: str) -> RearError:
    return RearError(f"{reference} cannot be fetched ({why}): connect, or download it elsewhere and name the file.")


def _file_or_folder(reference: Reference, library: ModuleType) -> Path:
    if not PurePosixPath(reference.path).suffix:
        return _folder(reference, library)
    file = _file(reference, reference.path, library)
    if file.name.endswith(".index.json"):
        _shards_of(reference, reference.path, file, library)
    return file


def _file(reference: Reference, path: str, library: ModuleType) -> Path:
    return Path(library.hf_hub_download(reference.repo, path, revision=reference.revision))


def _shards_of(reference: Reference, path: str, index: Path, library: ModuleType) -> None:
    """Fetches the files that an index names, beside it."""
    for name in shards.files_of_index(index):
        _file(reference, str(PurePosixPath(path).parent / name), library)


def _folder(reference: Reference, library: ModuleType) -> Path:
    """The weights in a folder, of several forms of them the one that would be read, and all small files beside them."""
    start = f"{reference.path}/" if reference.path else ""
    try:
        listed = library.HfApi().list_repo_files(reference.repo, revision=reference.revision)
    except (library.errors.RepositoryNotFoundError, library.errors.RevisionNotFoundError):
        raise
    except (OSError, library.errors.HTTPError):
        if (kept := _kept(reference, start, library)) is None:
            raise
        return kept
    inside = {path.removeprefix(start) for path in listed if path.startswith(start)}
    inside = {name for name in inside if "/" not in name}
    indices = sorted(name for name in inside if name.endswith(".index.json"))
    weights = next((name for name in shards.NAMES if name in inside), indices[0] if len(indices) == 1 else None)
    small = sorted(name for name in inside if name.endswith(SMALL) and name not in indices)
    places = [_file(reference, start + name, library) for name in (*([weights] if weights else []), *small)]
    if not places:
        raise library.errors.EntryNotFoundError(f"nothing under {start!r}")
    if weights in indices:
        _shards_of(reference, start + weights, places[0], library)
    return places[0].parent


def _kept(reference: Reference, start: str, library: ModuleType) -> Path | None:
    """The folder as the cache has it, None where it has nothing of it."""
    for name in (*shards.NAMES, *VOCABULARIES):
        found = library.try_to_load_from_cache(reference.repo, start + name, revision=reference.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None
