"""Data sets of TFDS, stored as array_record; they are read without TensorFlow."""

from pathlib import Path
from types import ModuleType
from typing import Any

from rear_jax.data.sources import contents
from rear_jax.data.sources.broken import Broken
from rear_jax.data.sources.encoded import EncodedImages
from rear_jax.data.sources.interface import ImageSource, SourceSettings
from rear_jax.errors import UNREADABLE, RearError, one_line


class TfdsSource(EncodedImages):
    """A TFDS data set with the features `image` (left encoded on disk) and `label`."""

    def __init__(
        self, records: Any, name: str, class_names: tuple[str, ...], num_classes: int, digits: str, broken: Broken
    ):
        """`records`: a tfds.data_source, random access to {'image': encoded bytes, 'label': integer}.

        `digits` are the `contents` of its files.
        """
        super().__init__(name, num_classes, class_names, broken)
        self._records, self.contents = records, digits

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int) -> tuple[bytes, int]:
        try:
            record = self._records[index]
            return record["image"], int(record["label"])
        except (*UNREADABLE, RuntimeError) as error:  # the latter from array_record
            raise RearError(
                f"{self._where(index)} cannot be read ({one_line(str(error))[:200]}); prepare the set again"
            ) from None

    def _where(self, index: int) -> str:
        return f"{self.name}, record {index}"


def open_tfds(path: str, split: str, settings: SourceSettings) -> ImageSource:
    """See `open_source`."""
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
    except OSError as error:
        reason = one_line(str(error))[:200]
        raise RearError(f"TFDS data set {path} cannot be read ({reason}); prepare it again") from None
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise RearError(f"TFDS data set {path} cannot give split {split!r}; it has: {known}") from error
    labels, broken = features["label"], Broken(builder.name, settings.max_broken_share)
    files = sorted(file for file in Path(builder.data_dir).iterdir() if file.is_file())
    digits = contents.of_files(files, split)
    return TfdsSource(records, builder.name, tuple(labels.names), labels.num_classes, digits, broken)


def class_names(path: str) -> tuple[str, ...]:
    """Names of the classes by number, () where they have none; raises RearError where the set is not prepared."""
    import tensorflow_datasets as tfds  # as above

    label = _tfds_builder(tfds, path).info.features.get("label")
    names = tuple(label.names) if isinstance(label, tfds.features.ClassLabel) else ()
    return () if names == tuple(map(str, range(len(names)))) else names  # what TFDS says where there are none


def _builder_of_folder(tfds: ModuleType, directory: Path) -> Any:
    """The builder of a version folder; raises RearError where its records of itself are damaged."""
    from google.protobuf import json_format

    try:
        return tfds.builder_from_directory(str(directory))
    except (*UNREADABLE, json_format.Error, AssertionError) as error:
        reason = one_line(str(error))[:200]
        raise RearError(f"{directory} is no whole TFDS data set ({reason}); prepare it again") from None


def _tfds_builder(tfds: ModuleType, path: str) -> Any:
    """The builder of a prepared data set, by the folder of its files or by its name."""
    directory = Path(path).expanduser()
    if (directory / "dataset_info.json").is_file():
        return _builder_of_folder(tfds, directory)
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
