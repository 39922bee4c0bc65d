"""Fashion-MNIST: the subset that ships with the package, and the full set from its published files.

    python -m rear_jax.data.fashion_mnist --source DIR

rebuilds the embedded subset byte for byte from the four published `*-ubyte.gz` files in DIR.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
arXiv 1708.07747; MIT licence, see embedded/LICENSE.
"""

import argparse
import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np

from rear_jax.errors import RearError
from rear_jax.runtime.atomic import atomic_file

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
EMBEDDED = Path(__file__).parent / "embedded" / "fashion_mnist.npz"
LARGEST_IDX = 2**26  # bytes; the largest of the published files has 47 million
SUBSET_PER_CLASS = {"train": 1200, "test": 200}
FILE_PREFIX = {"train": "train", "test": "t10k"}  # how the published files call the two splits


def load_embedded(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The embedded subset: images uint8 [n, 28, 28] (0 = background) and labels uint8 [n], balanced over classes.

    Raises RearError: `split` is neither 'train' nor 'test'.
    """
    _check_split(split)
    with np.load(EMBEDDED) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def load_full(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The published files of one split, 60 000 or 10 000 images, in the form of `load_embedded`.

    Raises RearError: `split` is unknown, or a file is missing or damaged.
    """
    _check_split(split)
    prefix = FILE_PREFIX[split]
    images = _read_idx(directory / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(directory / f"{prefix}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise RearError(f"{directory}: {images.shape} images do not go with {labels.shape} labels; fetch the set again")
    return images, labels


def build_embedded(source: Path, target: Path = EMBEDDED) -> None:
    """Writes the subset: per split the first `SUBSET_PER_CLASS` images of each class, in the published order.

    The file is an ordinary npz whose entries are compressed by LZMA rather than deflate, 10 % smaller.
    """
    with atomic_file(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
        for split, per_class in SUBSET_PER_CLASS.items():
            images, labels = load_full(source, split)
            firsts = [np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASS_NAMES))]
            keep = np.sort(np.concatenate(firsts))
            for name, array in (("images", images[keep]), ("labels", labels[keep])):
                with archive.open(f"{split}_{name}.npy", "w") as entry:
                    np.lib.format.write_array(entry, array, allow_pickle=False)


def _read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped idx file of uint8: two zero bytes, 0x08, the rank, big-endian uint32 sizes, the data."""
    if not path.is_file():
        raise RearError(f"{path} is missing: name the folder that holds Fashion-MNIST's four *-ubyte.gz files")
    try:
        with gzip.open(path) as file:
            data = file.read(LARGEST_IDX)
    except (OSError, EOFError, zlib.error) as error:
        raise RearError(f"{path} is not a readable gzip file ({error}); fetch it again") from None
    rank = data[3] if data[:3] == b"\x00\x00\x08" else 0
    shape = tuple(int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis]) for axis in range(rank))
    if rank == 0 or len(data) != 4 + 4 * rank + math.prod(shape):
        raise RearError(f"{path} is not an idx file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _check_split(split: str) -> None:
    if split not in FILE_PREFIX:
        raise RearError(f"Fashion-MNIST has no split {split!r}; use one of: {', '.join(FILE_PREFIX)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Rebuild the embedded Fashion-MNIST subset.")
    parser.add_argument("--source", type=Path, required=True, help="folder with the four published *-ubyte.gz files")
    build_embedded(parser.parse_args().source)
