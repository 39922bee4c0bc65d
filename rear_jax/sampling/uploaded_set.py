"""A set of images while it is being drawn, where its folder is in a bucket.

A memory map cannot be there, and on a mounted bucket a byte that changes uploads the whole file. So the set is drawn in
scratch, and what is new is uploaded in parts. The numbers of a part's images are written last: they make it count.
"""

import time
from pathlib import Path

import numpy as np

from rear_jax.runtime import places
from rear_jax.runtime.array_files import read_npy
from rear_jax.runtime.atomic import atomic_file, write_json
from rear_jax.sampling.sampled_set import SampledSet, is_of

PART_SECONDS = 60.0  # a part is uploaded after so long, or when the job is stopped
REMEDY = "delete the folder samples.partial and run --job=sample again"


class UploadedSet(SampledSet):
    """As `SampledSet`, with its images in scratch."""

    def __init__(self, folder: Path, recipe: dict, shape: tuple[int, int, int, int], *, write: bool):
        """Fetches what an earlier process has uploaded; arguments and errors as of `SampledSet`."""
        self._parts, self._new, self._kept_at = folder, [], time.monotonic()
        if write and not is_of(folder, recipe):
            places.remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "recipe.json", recipe)
        self._next = 0
        if not write:
            self.done = np.zeros(shape[:1], np.bool_)
            for _, numbers in self._uploaded():
                self.done[numbers] = True
            return
        super().__init__(places.scratch(folder) / "set", recipe, shape, write=True)
        for images, numbers in self._uploaded():
            super().add(numbers, read_npy(images, REMEDY))

    def add(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Stores images [b, H, W, 3], and uploads a part from time to time."""
        super().add(indices, images)
        self._new.append(np.asarray(indices))
        if time.monotonic() - self._kept_at > PART_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Uploads what no part has yet."""
        if self._new:
            numbers = np.concatenate(self._new)
            for name, array in (("images", self.images[numbers]), ("numbers", numbers)):
                with atomic_file(self._parts / f"{name}-{self._next:06d}.npy") as file, file.open("wb") as opened:
                    np.save(opened, array, allow_pickle=False)
            self._new, self._next = [], self._next + 1
        self._kept_at = time.monotonic()

    def remove(self) -> None:
        """Deletes the parts and the images in scratch."""
        super().remove()
        places.remove(self._parts)

    def _uploaded(self) -> list[tuple[Path, np.ndarray]]:
        """The file with the images of each whole part, and their numbers."""
        files = sorted(self._parts.glob("numbers-*.npy"))
        parts = [file.name.removeprefix("numbers-") for file in files]
        if parts:
            self._next = 1 + int(parts[-1].removesuffix(".npy"))
        return [(self._parts / f"images-{part}", read_npy(self._parts / f"numbers-{part}", REMEDY)) for part in parts]


def open_set(folder: Path, recipe: dict, shape: tuple[int, int, int, int], *, write: bool) -> SampledSet:
    """The set in a folder, wherever that is; arguments and errors as of `SampledSet`."""
    kind = UploadedSet if places.is_bucket(folder) or places.is_mounted_bucket(folder) else SampledSet
    return kind(folder, recipe, shape, write=write)
