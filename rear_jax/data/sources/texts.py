"""Captions as files hold them: plain text, or under a key of a record. A bad one is a ValueError that says why."""

import json
from collections.abc import Mapping
from typing import Any

LONGEST_CLASS_NAME = 200  # characters
MOST_CLASSES = 2**31


def plain_caption(raw: bytes) -> str:
    """The caption that a text file holds; raises ValueError where it is not UTF-8 or empty."""
    return _filled(_decoded(raw))


def class_name(text: str) -> str:
    """The name of a class; raises ValueError where it is empty or as long as a caption."""
    name = _filled(text)
    if len(name) > LONGEST_CLASS_NAME:
        raise ValueError(f"its class has a name of {len(name)} characters; it may have {LONGEST_CLASS_NAME}")
    return name


def class_of(value: Any) -> int | str:
    """The number or the name of a class; raises ValueError where this value is neither."""
    if isinstance(value, str):
        name = class_name(value)
        value = int(name) if name.isascii() and name.isdecimal() and str(int(name)) == name else name
    if isinstance(value, str):
        return value
    if type(value) is not int:
        raise ValueError(f"its class is of the type {type(value).__name__}")
    if not 0 <= value < MOST_CLASSES:
        raise ValueError(f"its class is {value}")
    return value


def json_record(raw: bytes) -> dict[str, Any]:
    """A JSON object; raises ValueError where these bytes are none."""
    try:
        record = json.loads(_decoded(raw))
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    except RecursionError:
        raise ValueError("no JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    return record


def text_at(record: Mapping[str, Any], key: str) -> str:
    """The text under a key; raises ValueError where the record has none there, or what it has is no text."""
    if key not in record:
        raise ValueError(f"no key {key!r} but {', '.join(record) or 'none'}")
    return _filled(record[key])


def caption_at(record: Mapping[str, Any], key: str) -> str:
    """The caption under `config.data.caption_key`; raises ValueError where the record has none."""
    if key not in record:
        raise ValueError(f"config.data.caption_key = {key!r} is none of its keys {', '.join(record) or '(none)'}")
    return text_at(record, key)


def class_at(record: Mapping[str, Any], key: str) -> int | str:
    """The class under `config.data.label_key`; raises ValueError where the record has none."""
    if key not in record:
        raise ValueError(f"config.data.label_key = {key!r} is none of its keys {', '.join(record) or '(none)'}")
    return class_of(record[key])


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text ({error.reason} at byte {error.start})") from None


def _filled(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"its text is of the type {type(text).__name__}")
    if not (stripped := text.strip()):
        raise ValueError("its text is empty")
    try:
        stripped.encode()
    except UnicodeEncodeError:
        raise ValueError("its text is no UTF-8") from None
    return stripped
