"""What the columns of a .parquet file are: which hold images, captions or classes, and how the classes are called."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rear_jax.data.sources.interface import SourceSettings
from rear_jax.errors import RearError, one_line


class Form(NamedTuple):
    """The columns of a file.

    Attributes:
      image: the one of encoded images; `a.b` is the field b of the column a.
      beside: the one of captions or classes.
      captioned: whether it holds captions.
      named: whether it holds names of classes; otherwise numbers.
      class_names: names of the numbers, where the file tells them.
    """

    image: str
    beside: str
    captioned: bool
    named: bool
    class_names: tuple[str, ...]


def form_of(path: Path, settings: SourceSettings) -> tuple[Any, Form]:
    """The footer of a file, as pyarrow has it, and its columns; raises RearError where they are not fit."""
    import pyarrow as pa  # here, because other sources need none of it

    metadata, schema = _schema(path)
    image, caption, label = settings.image_key, settings.caption_key, settings.label_key
    captioned = caption in schema.names
    column = caption if captioned else label
    if image not in schema.names or column not in schema.names:
        raise RearError(
            f"{path} has the columns {', '.join(schema.names)}; it needs {image} (config.data.image_key), and "
            f"{caption or 'captions'} (config.data.caption_key) or {label} (config.data.label_key)"
        )
    kind, beside = schema.field(image).type, schema.field(column).type
    fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
    if "bytes" not in fields and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise RearError(f"{path}: the column {image} is {kind}; it needs encoded images as bytes")
    if pa.types.is_dictionary(beside):
        beside = beside.value_type
    text = pa.types.is_string(beside) or pa.types.is_large_string(beside)
    if not text and (captioned or not pa.types.is_integer(beside)):
        wanted = "text" if captioned else "integers or text"
        raise RearError(f"{path}: the column {column} is {beside}; it needs {wanted}")
    names = () if text else _class_names(schema.metadata or {}, column)
    return metadata, Form(f"{image}.bytes" if fields else image, column, captioned, text and not captioned, names)


def _schema(path: Path) -> tuple[Any, Any]:
    """The footer of a file and the types of its columns; raises RearError where there are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            return file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(str(error))
        raise RearError(f"{path} is no whole .parquet file ({reason}); copy it again or remove it") from None


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> tuple[str, ...]:
    """Names of the classes, where Hugging Face datasets wrote them into the schema."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
