"""Captions that a network writes for a folder of images: kept one batch after the other, and in the end beside them.

While they are made they lie in a folder of the run. `recipe.json` says how they are made, and each line of
`captions.jsonl` is a batch, as a JSON object from the names of its images to their captions. A killed run leaves at
most a torn last line, which the next one takes off. `metadata.jsonl`, which the source `imagefolder` reads, appears
beside the images when all are done, whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rear_jax.data.sources.imagefolder import FILE_NAME, METADATA
from rear_jax.data.sources.interface import SourceSettings
from rear_jax.data.sources.texts import json_record
from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.runtime.atomic import atomic_file, write_json

RECIPE, CAPTIONS = "recipe.json", "captions.jsonl"
KEY = SourceSettings().caption_key  # of a caption in metadata.jsonl
WRITTEN = "written"  # in recipe.json: digests of each metadata.jsonl of this run


class Descriptions:
    """Captions of a folder of images, as far as they are made.

    Attributes:
      captions: name of an image, as a path from its folder -> its caption.
    """

    def __init__(self, folder: Path, images: Path, recipe: Mapping[str, Any]):
        """Begins, or goes on where a killed run ended.

        Args:
          folder: of the run; made if it does not exist.
          images: the folder of the images.
          recipe: all that decides the captions, by name, as JSON has it.

        Raises RearError: as `refuse_other`, or what is kept is damaged.
        """
        refuse_other(folder, images, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._images = folder, images
        self._content = _read(folder / RECIPE) or {**recipe, WRITTEN: []}
        write_json(folder / RECIPE, self._content)
        self.captions = _whole_batches(places.appended(folder / CAPTIONS))

    def add(self, captions: Mapping[str, str]) -> None:
        """Keeps the captions of a batch; they are on the disk when this returns."""
        with places.appended(self._folder / CAPTIONS).open("ab") as file:
            file.write(json.dumps(captions).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.captions.update(captions)

    def publish(self, names: Iterable[str]) -> None:
        """Writes metadata.jsonl beside the images: a row for each that has a caption, in the order of the names."""
        rows = ({FILE_NAME: name, KEY: self.captions[name]} for name in names if name in self.captions)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        digest = hashlib.sha256(text).hexdigest()
        if digest not in self._content[WRITTEN]:
            self._content[WRITTEN].append(digest)
            write_json(self._folder / RECIPE, self._content)  # first: else the file would be a stranger's
        with atomic_file(self._images / METADATA[0]) as temporary:
            temporary.write_bytes(text)


def refuse_other(folder: Path, images: Path, recipe: Mapping[str, Any], *, but: tuple[str, ...] = ()) -> None:
    """Refuses to go on with captions of another recipe, or to replace a metadata file that this run did not write.

    Args: as of `Descriptions`; entries of the recipe that are named in `but` may differ.

    Raises RearError: either is so, or recipe.json is damaged.
    """
    kept = _read(folder / RECIPE)
    for name, value in json.loads(json.dumps(recipe)).items():
        if kept and name not in but and kept.get(name) != value:
            raise RearError(
                f"{folder} was begun with {name} {kept.get(name)!r}, not {value!r}: give another --workdir or delete "
                "that folder."
            )
    for file in (images / name for name in METADATA):
        if file.exists() and _digest(file) not in kept.get(WRITTEN, ()):
            raise RearError(f"{file} is there, and this run did not write it: move it away to have new captions.")


def _read(path: Path) -> dict[str, Any]:
    """recipe.json, empty where it is missing."""
    if not path.exists():
        return {}
    try:
        content = json_record(path.read_bytes())
        if not isinstance(content[WRITTEN], list):
            raise ValueError(f"{WRITTEN} is no list")
    except (ValueError, KeyError, OSError) as error:
        raise RearError(f"{path} is damaged ({error}): delete its folder and run --job=describe again.") from None
    return content


def _whole_batches(path: Path) -> dict[str, str]:
    """The captions in whole lines of a file, which loses its torn last line."""
    captions: dict[str, str] = {}
    if not path.exists():
        return captions
    whole = 0
    with path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            try:
                batch = json_record(line)
                if not all(isinstance(text, str) for text in batch.values()):
                    raise ValueError("a caption is no text")
            except ValueError as error:
                raise RearError(
                    f"{path}, byte {whole} is damaged ({error}): delete its folder and run --job=describe again."
                ) from None
            captions |= batch
            whole += len(line)
        file.truncate(whole)
    return captions


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
