"""A set of images while it is being drawn: on disk, so that it takes no memory and a later process can go on."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from rear_jax.data.archive import IMAGES
from rear_jax.errors import RearError
from rear_jax.runtime.array_files import map_npy
from rear_jax.runtime.atomic import atomic_file, read_json

CHUNK = 256  # images that are copied at once


class SampledSet:
    """uint8 images [n, H, W, 3] in a folder, in any order, with a mark for each that is there.

    Attributes:
      images: the images, memory-mapped.
      done: [n] bool, which of them are there.
    """

    def __init__(self, folder: Path, recipe: dict, shape: tuple[int, int, int, int], *, write: bool):
        """Opens what an earlier process has left, if that was drawn by the same recipe, else begins anew.

        Args:
          folder: of this set alone.
          recipe: everything that the images depend on.
          shape: (n, H, W, 3).
          write: whether this process writes; another one only reads `done`, once, after the writer has opened the set.

        Raises:
          OSError: the disk has no room for the set.
          RearError: a file of the set is damaged.
        """
        self._folder, mode = folder, "r+" if write else "r"
        if write and not is_of(folder, recipe):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _create(folder / "images.npy", np.uint8, shape)
            _create(folder / "done.npy", np.bool_, shape[:1])
            (folder / "recipe.json").write_text(json.dumps(recipe))
        remedy = f"delete {folder} and run --job=sample again"
        self.images = map_npy(folder / "images.npy", remedy, mode)
        self.done = map_npy(folder / "done.npy", remedy, mode)
        found = [(array.shape, array.dtype) for array in (self.images, self.done)]
        if found != [(shape, np.uint8), (shape[:1], np.bool_)]:
            raise RearError(f"{folder} holds other arrays than {shape[0]} images and their marks: {remedy}.")

    def add(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Stores images [b, H, W, 3]; they are on disk before they are marked."""
        self.images[indices] = images
        self.images.flush()
        self.done[indices] = True
        self.done.flush()

    def keep(self) -> None:
        """Makes sure that a later process finds what was drawn: it does, `add` has written it to the disk."""

    def export(self, path: Path, labels: np.ndarray) -> None:
        """Writes the whole set to an .npz as ADM's evaluator reads it, `arr_0`, with `labels` [n] beside it.

        A few images at a time: the memory it takes does not depend on n.
        """
        with (
            atomic_file(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as file,
        ):
            with file.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": self.images.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, len(self.images), CHUNK):
                    member.write(self.images[start : start + CHUNK].tobytes())
            with file.open("labels.npy", "w") as member:
                np.lib.format.write_array(member, labels)

    def remove(self) -> None:
        """Deletes the folder; the set has been exported."""
        del self.images, self.done
        shutil.rmtree(self._folder)


def is_of(folder: Path, recipe: dict) -> bool:
    """Whether a folder holds a set that was begun by this recipe; the recipe is the last that is written."""
    file = folder / "recipe.json"
    return file.is_file() and read_json(file) == json.loads(json.dumps(recipe))


def _create(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """An array file that has all its space already: where a disk has none left, writing to a map kills the process.

    Raises:
      OSError: the disk has no room for it.
    """
    np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
    if hasattr(os, "posix_fallocate"):  # macOS has none
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
