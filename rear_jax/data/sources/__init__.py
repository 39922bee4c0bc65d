"""Where images come from.

A source is a random-access sequence of (image, label). `open_source(name, path, split)` knows these kinds:

  fashion_mnist  `path` is '' for the embedded subset, or a folder with the four published *-ubyte.gz files;
                 `split` is 'train' or 'test'.
  fashion_captions  the same images with captions that say what is in them, see rear_jax/data/fashion_captions.py.
  folder         the images are in `<path>/<split>/<class>/`, or for the split '' in `<path>/<class>/`.
  flat           one class: the images are in `<path>/<split>/`, or in `<path>`, where a hash of each name gives it to
                 the training split or to the held-out one.
  archive        the class folders of `folder` inside .zip or .tar files: `<split>/<class>/` in the file `path`, or
                 `<class>/` in the files of a split, see `split_files`.
  tfds           `path` is a TFDS name ('imagenet2012', looked for in $TFDS_DATA_DIR) or the version folder of a
                 prepared set ('DIR/imagenet2012/5.1.0'), stored as array_record (launch/prepare_imagenet.sh makes
                 one); `split` is one of its splits.
  arrays         `path` is an .npz with `<split>_images` and `<split>_labels`, or for the split '' `images` and
                 `labels`; a `num_classes` in it is heeded.
  imagefolder    images with captions or classes in `<path>/<split>/`, which a metadata.jsonl or metadata.csv there
                 names.
  webdataset     .tar shards of images with captions or classes, see `split_files`.
  parquet        .parquet files with a column of images and one of captions or classes, see `split_files`.

The last three and `fashion_captions` may have captions (`captioned`): the label of an image is then the number of its
caption, that is its index.
"""

import functools
import hashlib
import json
import logging
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from rear_jax.data.sources import archives, contents, imagefolder, parquet, webdataset
from rear_jax.data.sources.arrays import open_arrays, open_fashion_captions, open_fashion_mnist
from rear_jax.data.sources.broken import warn_once
from rear_jax.data.sources.folders import class_folders, open_flat, open_folder
from rear_jax.data.sources.interface import STRICT, HeldOut, ImageSource, SourceKind, SourceSettings, captioned
from rear_jax.data.sources.tfds_sets import open_tfds
from rear_jax.errors import RearError
from rear_jax.runtime import distributed

log = logging.getLogger(__name__)

FINGERPRINT_IMAGES = 32  # that `fingerprint` reads

SOURCES = {
    "fashion_mnist": SourceKind(open_fashion_mnist),
    "fashion_captions": SourceKind(open_fashion_captions),
    "folder": SourceKind(open_folder, class_folders),
    "flat": SourceKind(open_flat),
    "archive": SourceKind(archives.open_archive, archives.class_names),
    "tfds": SourceKind(open_tfds),
    "arrays": SourceKind(open_arrays),
    "imagefolder": SourceKind(imagefolder.open_imagefolder, imagefolder.class_names),
    "webdataset": SourceKind(webdataset.open_webdataset, webdataset.class_names),
    "parquet": SourceKind(parquet.open_parquet, parquet.class_names),
}


def require_classes(source: "ImageSource | SplitFacts", num_classes: int) -> None:
    """Raises RearError where a source has labels that `config.data.num_classes` leaves no room for."""
    if source.num_classes > num_classes:
        raise RearError(
            f"{source.name} has {source.num_classes} classes, config.data.num_classes is {num_classes}: raise it."
        )


def fingerprint(source: ImageSource) -> str:
    """Tells sources apart by their size, their classes, and label, caption and pixels of a few evenly spread images.

    Unlike `contents` it is the same for two copies of a set, whatever kind they are of: for hosts to compare.

    Raises RearError: one of those images cannot be read.
    """
    digest = hashlib.sha256(json.dumps([len(source), source.num_classes, source.class_names]).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, FINGERPRINT_IMAGES).astype(int)).tolist():
        image, label = source[index]
        digest.update(f"{label} {image.shape}".encode() + image.tobytes())
        if captioned(source):
            digest.update(source.caption(label).encode())
    return digest.hexdigest()


def agreed_contents(source: ImageSource) -> str:
    """The `contents` as process 0 has them, whose copies of the files may have other times; all processes must ask."""
    return f"{distributed.every(int(source.contents, 16))[0]:0{contents.DIGITS}x}"


def open_source(name: str, path: str, split: str, settings: SourceSettings = STRICT) -> ImageSource:
    """Opens one split of an image source, a key of `SOURCES`; the list above says what `path` is. `~` is expanded.

    Raises RearError: the name is unknown, nothing usable is at `path`, or more of it is broken than may be.
    """
    if name not in SOURCES:
        raise RearError(f"unknown image source {name!r}; the known ones are: {', '.join(SOURCES)}")
    return SOURCES[name].open(path, split, settings)


def source_settings(data: ConfigDict, split: str) -> SourceSettings:
    """What `open_source` needs of `config.data` for a split: the training split numbers the classes of every other."""
    settings = SourceSettings(
        data.caption_key,
        data.max_broken_share,
        image_key=data.image_key,
        label_key=data.label_key,
        held_out=HeldOut((data.train_split, data.eval_split), data.held_out_share, data.held_out_seed),
    )
    if split == data.train_split:
        return settings
    return settings._replace(class_names=_training_names(data.source, data.path, data.train_split, settings))


def open_split(data: ConfigDict, split: str) -> ImageSource:
    """The images of one split of `config.data`.

    Raises RearError: as `open_source`; it has a class that the training split lacks; or as `require_classes`, unless it
      has captions in the place of classes.
    """
    source = open_source(data.source, data.path, split, source_settings(data, split))
    if not captioned(source):
        _check_classes(facts_of(source), data, split)
    return source


class SplitFacts(NamedTuple):
    """What checks ask of a split; the same attributes as of its source, and the number of its images."""

    name: str
    num_classes: int
    num_images: int
    captioned: bool
    contents: str


def facts_of(source: ImageSource) -> SplitFacts:
    """Of a source that is open."""
    return SplitFacts(source.name, source.num_classes, len(source), captioned(source), source.contents)


def split_facts(data: ConfigDict, split: str) -> SplitFacts:
    """What `open_split` finds, and its errors; a split that several jobs read is opened once, until `forget_splits`."""
    facts = _facts(data.source, data.path, split, source_settings(data, split))
    if not facts.captioned:
        _check_classes(facts, data, split)
    return facts


@functools.cache
def _facts(name: str, path: str, split: str, settings: SourceSettings) -> SplitFacts:
    return facts_of(open_source(name, path, split, settings))


def with_class_count(config: ConfigDict) -> ConfigDict:
    """The settings with the number of classes of the training images, where `config.data.num_classes` is 0.

    Images with captions count as one class.

    Raises RearError: the images that are asked cannot be opened.
    """
    data = config.data
    if data.num_classes:
        return config
    try:
        facts = _facts(data.source, data.path, data.train_split, source_settings(data, data.train_split))
    except RearError as error:
        raise RearError(f"{error}; or set config.data.num_classes, which asks the images where it is 0") from None
    counted = config.copy_and_resolve_references()
    counted.data.num_classes = 1 if facts.captioned else facts.num_classes
    log.info("config.data.num_classes = 0: it is %d, as %s has", counted.data.num_classes, facts.name)
    return counted


def _training_names(name: str, path: str, split: str, settings: SourceSettings) -> tuple[str, ...]:
    """Names of the classes of the training split by number; () where its numbers are those of every split."""
    if name not in SOURCES or not (class_names := SOURCES[name].class_names):
        return ()
    try:
        return class_names(path, split, settings)
    except RearError as error:
        warn_once(f"{error}; the held-out images get class numbers of their own")
        return ()


def _check_classes(facts: SplitFacts, data: ConfigDict, split: str) -> None:
    """As `require_classes`; warns of classes that nothing is trained on."""
    require_classes(facts, data.num_classes)
    if split == data.train_split and facts.num_classes < data.num_classes:
        warn_once(
            f"{facts.name} has {facts.num_classes} classes where config.data.num_classes is {data.num_classes}: images "
            f"of the other {data.num_classes - facts.num_classes} are drawn, which no training image shows; set it to "
            f"{facts.num_classes} unless the weights that you go on from have more"
        )


def forget_splits() -> None:
    """What `split_facts` has found, and which warnings were given."""
    _facts.cache_clear()
    warn_once.cache_clear()
