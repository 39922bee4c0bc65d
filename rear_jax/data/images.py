"""Where images come from.

A source is a random-access sequence of (image, label). `open_source(name, path, split)` knows four kinds:

  fashion_mnist  `path` is '' for the embedded subset, or a folder with the four published *-ubyte.gz files;
                 `split` is 'train' or 'test'.
  folder         the images are in `<path>/<split>/<class>/`, or for the split '' in `<path>/<class>/`.
  tfds           `path` is a TFDS name ('imagenet2012', looked for in $TFDS_DATA_DIR) or the version folder of a
                 prepared set ('DIR/imagenet2012/5.1.0'), stored as array_record (launch/prepare_imagenet.sh makes
                 one); `split` is one of its splits.
  arrays         `path` is an .npz with `<split>_images` and `<split>_labels`, or for the split '' `images` and
                 `labels`; a `num_classes` in it is heeded.
"""

import functools
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, SupportsIndex

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

from rear_jax.data import fashion_mnist
from rear_jax.errors import RearError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FINGERPRINT_IMAGES = 32  # that `fingerprint` reads
FASHION_MNIST_MARGIN = 2  # pixels of background on each side: 28 -> 32


class ImageSource(Protocol):
    """A sequence of labelled images.

    Attributes:
      name: what the source is called in headers and logs.
      num_classes: labels are in [0, num_classes).
      class_names: one name per class, or empty where they have none.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        """Image `index` as uint8 [H, W, 3] and its label."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory: uint8 [n, H, W, 3], or grey [n, H, W], and labels [n]."""

    images: np.ndarray
    labels: np.ndarray
    name: str
    num_classes: int
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        grey_or_rgb = self.images.ndim == 3 or (self.images.ndim == 4 and self.images.shape[3] == 3)
        if self.images.dtype != np.uint8 or not grey_or_rgb:
            raise RearError(
                f"{self.name}: images are {self.images.dtype} {self.images.shape}, wanted uint8 [n, H, W, 3]"
            )
        if self.labels.shape != self.images.shape[:1] or not np.issubdtype(self.labels.dtype, np.integer):
            raise RearError(
                f"{self.name}: labels are {self.labels.dtype} {self.labels.shape}, wanted one integer per image"
            )
        if len(self.images) == 0:
            raise RearError(f"{self.name}: holds no images")
        _check_label(int(self.labels.min()), self.num_classes, self.name)
        _check_label(int(self.labels.max()), self.num_classes, self.name)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        image = self.images[index]
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        return image, int(self.labels[index])


@dataclass(frozen=True)
class FolderSource:
    """Image files, sorted by class name and then by file name."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    name: str
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        file = self.files[index]
        return _decode(file, str(file)), self.labels[index]


@dataclass(frozen=True)
class TfdsSource:
    """A TFDS data set with the features `image` (left encoded on disk) and `label`; needs no TensorFlow."""

    records: Any  # tfds.data_source: random access to {'image': encoded bytes, 'label': integer}
    name: str
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        record = self.records[index]
        where = f"{self.name}, record {index}"
        label = int(record["label"])
        _check_label(label, self.num_classes, where)
        return _decode(io.BytesIO(record["image"]), where), label


class Spread:
    """At most `count` images of a source, evenly spread, so that a set sorted by class stays balanced."""

    def __init__(self, source: ImageSource, count: int):
        self._source, self._indices = source, spread(len(source), count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, int]:
        return self._source[int(self._indices[int(index)])]


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices of `total`, evenly spread."""
    count = min(total, wanted)
    return np.arange(count) * total // count


def require_classes(source: "ImageSource | SplitFacts", num_classes: int) -> None:
    """Raises RearError where a source has labels that `config.data.num_classes` leaves no room for."""
    if source.num_classes > num_classes:
        raise RearError(
            f"{source.name} has {source.num_classes} classes, config.data.num_classes is {num_classes}: raise it."
        )


def fingerprint(source: ImageSource) -> str:
    """Tells sources apart by their size, their classes, and label and pixels of a few evenly spread images.

    Raises RearError: one of those images cannot be read.
    """
    digest = hashlib.sha256(json.dumps([len(source), source.num_classes, source.class_names]).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, FINGERPRINT_IMAGES).astype(int)).tolist():
        image, label = source[index]
        digest.update(f"{label} {image.shape}".encode() + image.tobytes())
    return digest.hexdigest()


def open_source(name: str, path: str, split: str) -> ImageSource:
    """Opens one split of an image source, a key of `SOURCES`; the list above says what `path` is. `~` is expanded.

    Raises RearError: the name is unknown, or nothing usable is at `path`.
    """
    if name not in SOURCES:
        raise RearError(f"unknown image source {name!r}; the known ones are: {', '.join(SOURCES)}")
    return SOURCES[name](path, split)


def open_split(data: ConfigDict, split: str) -> ImageSource:
    """The images of one split of `config.data`; raises RearError as `open_source` and `require_classes`."""
    source = open_source(data.source, data.path, split)
    require_classes(source, data.num_classes)
    return source


class SplitFacts(NamedTuple):
    """What checks ask of a split; the same attributes as of its source, and the number of its images."""

    name: str
    num_classes: int
    num_images: int


def split_facts(data: ConfigDict, split: str) -> SplitFacts:
    """What `open_split` finds, and its errors; a split that several jobs read is opened once, until `forget_splits`."""
    facts = _facts(data.source, data.path, split)
    require_classes(facts, data.num_classes)
    return facts


@functools.cache
def _facts(name: str, path: str, split: str) -> SplitFacts:
    source = open_source(name, path, split)
    return SplitFacts(source.name, source.num_classes, len(source))


forget_splits = _facts.cache_clear


def _open_fashion_mnist(path: str, split: str) -> ImageSource:
    if path:
        images, labels = fashion_mnist.load_full(_located(path), split)
    else:
        images, labels = fashion_mnist.load_embedded(split)
    margin = (FASHION_MNIST_MARGIN, FASHION_MNIST_MARGIN)
    images = np.pad(images, ((0, 0), margin, margin))
    return ArraySource(images, labels, "fashion_mnist", len(fashion_mnist.CLASS_NAMES), fashion_mnist.CLASS_NAMES)


def _open_folder(path: str, split: str) -> ImageSource:
    root = _located(path) / split
    if not root.is_dir():
        raise RearError(f"{path} has no folder {split!r}; set the split to a folder in it, or to '' if it has none")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        found = sorted(f for f in (root / class_name).iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise RearError(f"{root / class_name} holds no {' '.join(IMAGE_SUFFIXES)} files; fill or remove the folder")
        files += found
        labels += [label] * len(found)
    if not files:
        raise RearError(f"{root} holds no class folders; put the images in {root}/<class>/")
    return FolderSource(tuple(files), tuple(labels), root.name, tuple(classes))


def _open_tfds(path: str, split: str) -> ImageSource:
    import tensorflow_datasets as tfds  # here, because importing it takes seconds that other sources need not wait

    builder = _tfds_builder(tfds, path)
    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise RearError(f"TFDS data set {path} has the features {', '.join(features)}; `image` and `label` are needed")
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise RearError(f"TFDS data set {path}: its label is no ClassLabel but {features['label']}; use another set")
    try:
        records = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError:
        raise RearError(
            f"TFDS data set {path} is not stored for random access: "
            f"prepare it anew by `launch/prepare_imagenet.sh --dataset={builder.name} --data_dir=DIR` with a new DIR"
        ) from None
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise RearError(f"TFDS data set {path} cannot give split {split!r}; it has: {known}") from error
    return TfdsSource(records, builder.name, features["label"].num_classes, tuple(features["label"].names))


def _tfds_builder(tfds: ModuleType, path: str) -> Any:
    """The builder of a prepared data set, by the folder of its files or by its name."""
    directory = Path(path).expanduser()
    if (directory / "dataset_info.json").is_file():
        return tfds.builder_from_directory(str(directory))
    try:
        builder = tfds.builder(path)
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RearError(f"{path!r} is neither a prepared TFDS version folder nor a TFDS name ({reason})") from None
    if not (Path(builder.data_dir) / "dataset_info.json").is_file():
        raise RearError(
            f"TFDS data set {path} is not prepared in {builder.data_dir}: run `launch/prepare_imagenet.sh "
            f"--dataset={path} --data_dir=DIR`, or set TFDS_DATA_DIR to where it is"
        )
    return builder


def _open_arrays(path: str, split: str) -> ImageSource:
    file = _located(path)
    prefix = f"{split}_" if split else ""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
            num_classes = int(arrays["num_classes"]) if "num_classes" in arrays else int(labels.max(initial=-1)) + 1
    except KeyError as error:
        raise RearError(f"{file}: {error.args[0]}; it needs {prefix}images and {prefix}labels") from None
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise RearError(f"{file} is not an .npz of image and label arrays ({error})") from None
    return ArraySource(images, labels, file.stem, num_classes)


SOURCES: dict[str, Callable[[str, str], ImageSource]] = {
    "fashion_mnist": _open_fashion_mnist,
    "folder": _open_folder,
    "tfds": _open_tfds,
    "arrays": _open_arrays,
}


def _located(path: str) -> Path:
    located = Path(path).expanduser()
    if not path or not located.exists():
        raise RearError(f"the image path {path!r} does not exist; set it to where the images are")
    return located


def _decode(file: Path | io.BytesIO, where: str) -> np.ndarray:
    """Any image file as uint8 [H, W, 3]; `where` names it in the error."""
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise RearError(f"{where} is not a readable image ({error}); replace or remove it") from None


def _check_label(label: int, num_classes: int, where: str) -> None:
    if not 0 <= label < num_classes:
        raise RearError(f"{where}: label {label} is outside [0, {num_classes}); correct the labels or num_classes")
