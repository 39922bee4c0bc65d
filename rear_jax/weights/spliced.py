"""A published checkpoint written anew, with other values for some of its tensors and all others bit for bit.

The tensors go from file to file one by one, in the dtypes of the original.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime import places
from rear_jax.weights import safetensors_file, torch_writer
from rear_jax.weights.layout import outline
from rear_jax.weights.shards import keys_of_files, located, open_as_written
from rear_jax.weights.torch_files import STORAGE_DTYPES

DTYPES = {  # ending of a file -> the dtypes that it can hold
    ".safetensors": set(safetensors_file.DTYPES),
    ".bin": {dtype.name for dtype in STORAGE_DTYPES.values()},
}
MOST_REPEATED = 2  # bytes of all tensors to bytes of the file, where some lie in one place: each is written out
DESCRIBES = (".json", ".txt", ".model")  # endings of files beside weights that belong to a network


def check(target: Path, original: Path) -> None:
    """Raises RearError where headers tell that `save` will fail."""
    file, files = located(original), keys_of_files(original)
    if target.resolve() in {place.resolve() for place in (original, file, *(file.parent / name for name in files))}:
        raise RearError(f"{target} is the original itself: give another name, so that it is not lost.")
    if target.suffix in DTYPES:
        endings = {target.suffix}
    elif target.suffix or not original.is_dir():
        raise RearError(
            f"{target}: the name must end in .safetensors or .bin. Without an ending it is a folder, for which the "
            f"original must be one, and {original} is none."
        )
    elif target.exists():
        raise RearError(f"{target} exists already: name a new folder.")
    else:
        endings = {Path(name).suffix for name in files}
    shapes = outline(open_as_written(original))
    held = sum(places.size(file.parent / name) for name in files)
    if sum(tensor.nbytes for tensor in shapes.values()) > MOST_REPEATED * held:
        raise RearError(f"{original} is smaller than the weights that it promises: it is damaged, fetch it again.")
    for key, tensor in shapes.items():
        if any(tensor.dtype.name not in DTYPES.get(ending, ()) for ending in endings):
            raise RearError(f"{original}: {key} is of type {tensor.dtype}, which {target} cannot hold.")


def save(target: Path, original: Path, values: Mapping[str, np.ndarray]) -> None:
    """Writes the checkpoint under temporary names until it is whole.

    Args:
      target: FILE.safetensors or FILE.bin for all tensors in one file; or, where `original` is a folder, a new folder
        of the same files, also those that describe the network.
      original: see `shards.open_weights`.
      values: key in the original -> what takes the place of its tensor, in any float dtype and in its shape.

    Raises RearError: `original` cannot be read, or `check` refuses.
    """
    check(target, original)
    tensors = open_as_written(original)
    if target.suffix in DTYPES:
        _write(target, tensors, list(tensors), values)
        return
    with places.staged(target) as folder:
        folder.mkdir(parents=True)
        for name, keys in keys_of_files(original).items():
            _write(folder / name, tensors, keys, values)
        for file in sorted(original.iterdir()):
            of_other_weights = file.name.endswith(".index.json") and file != located(original)
            if file.suffix in DESCRIBES and file.is_file() and not of_other_weights:
                shutil.copyfile(places.local(file), folder / file.name)


def _write(target: Path, tensors: Mapping[str, np.ndarray], keys: list[str], values: Mapping[str, np.ndarray]) -> None:
    shapes = outline(tensors)
    write: Callable = safetensors_file.write if target.suffix == ".safetensors" else torch_writer.write
    pieces = (values[key].astype(shapes[key].dtype) if key in values else tensors[key] for key in keys)
    write(target, {key: shapes[key] for key in keys}, pieces)
