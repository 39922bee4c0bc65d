"""Who made what: the settings that an artifact depends on, fingerprints of networks, and recipes of finished jobs.

A checkpoint or a result is used again only by a config that agrees with its own about the settings listed here.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime.atomic import read_json
from rear_jax.runtime.mesh import fetch

# Settings by dotted name; a name that ends in a dot stands for a whole section.
TOKENIZER = ("tokenizer.", "data.image_size")  # the parameters of a tokenizer depend on these
GENERATOR = ("data.num_classes", "tokenizer.", "model.")  # the parameters of a generator depend on these
TRAINING = {  # a training job goes on only from a state with the same values
    "tokenizer": (
        *TOKENIZER,
        "tokenizer_training.codebook_update",
        "tokenizer_training.objective",
        "tokenizer_training.trained",
    ),
    "train": (*GENERATOR, "data.image_size", "method.name", "method.projector"),
    "posttrain": (*GENERATOR, "posttrain.method"),
}
STUDY = ("seed", "data.", "tokenizer.", "model.", "method.", "train.", "posttrain.")  # what a variant is trained by
STATE = ("model.", "tokenizer.", "method.", "train.", "tokenizer_training.", "posttrain.")  # shapes inside a state
# No parameter depends on these.
FREE = (
    "dtype",
    "precision",
    "attention",
    "remat",
    "unroll",
    "dropout",
    "token_dropout",
    "accumulation",
    "profile_steps",
)


def refuse_changes(saved: dict, now: ConfigDict, settings: tuple[str, ...], place: str) -> None:
    """Refuses to go on with a checkpoint, in `place`, that another config made.

    Raises RearError: some of the settings differ; each is named with both values.
    """
    if differing := differences(saved, now.to_dict(), settings):
        raise RearError(
            f"{place} belongs to another config: {', '.join(differing)}. Use another --workdir or the old values."
        )


def differences(saved: dict, now: dict, settings: tuple[str, ...]) -> list[str]:
    """The settings that differ between two configs, each with both values; those of `FREE` are left out."""
    old, new = flatten(saved), flatten(now)
    keys = [k for k in sorted(old.keys() | new.keys()) if k.startswith(settings) and k.split(".")[-1] not in FREE]
    return [f"{k} (was {old.get(k)!r}, now {new.get(k)!r})" for k in keys if old.get(k) != new.get(k)]


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings as 'a.b.c' -> value, tuples as lists (as JSON returns them)."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def fingerprint(params: Any, sizes: dict) -> str:
    """Sixteen hexadecimal digits that name these parameters with these sizes."""
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for path, leaf in sorted(traverse_util.flatten_dict(params, sep="/").items()):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(fetch(leaf)).reshape(-1).view(np.uint8))  # without a copy
    return digest.hexdigest()[:16]


def environment() -> dict[str, str]:
    """The libraries that compute and what they compute on; these may change the last digits of a result."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return versions | {"platform": f"{jax.default_backend()} ({jax.devices()[0].device_kind})"}


def is_done(path: Path, recipe: dict) -> bool:
    """Whether the JSON file at `path` exists and says that its job ran by this very recipe."""
    done = read_json(path)
    return bool(done) and all(done.get(key) == value for key, value in json.loads(json.dumps(recipe)).items())
