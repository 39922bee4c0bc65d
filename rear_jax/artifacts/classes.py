"""A generator that was trained for other classes than the config's: how many it has, and new ones in their place."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax import generators
from rear_jax.artifacts import published
from rear_jax.artifacts.workdir import saved
from rear_jax.errors import RearError
from rear_jax.runtime import sharding
from rear_jax.runtime.mesh import make_mesh


def class_count(place: Path, config: ConfigDict, network: nn.Module) -> int:
    """How many classes the generator in a place has, by headers; `network.num_classes` where they do not tell.

    Raises RearError: what is there differs from the config's network by more than that.
    """
    family, now = generators.family_of(network), network.num_classes
    shapes = family.shapes(network)
    if family.class_table not in shapes:  # it takes text
        return now
    if published.weights_file(place) is None:
        return _recorded(saved(place, "train").record(), now)
    rows = published.rows_of(place, config, family, shapes, family.class_table)
    count = now if rows is None else now + rows - shapes[family.class_table].shape[0]
    if count == now or count < 1:
        return now
    published.check_params(place, config, family, family.shapes(network.clone(num_classes=count)))
    return count


def refuse_other_classes(place: Path, config: ConfigDict, network: nn.Module) -> None:
    """Raises RearError where a generator has another number of classes than the config."""
    if (count := class_count(place, config, network)) != network.num_classes:
        raise RearError(
            f"{place} has {count} classes, config.data.num_classes = {network.num_classes}: set it to {count}. Only "
            "--job=train can go on from there with other classes."
        )


def for_classes_of(place: Path, config: ConfigDict, network: nn.Module) -> tuple[ConfigDict, nn.Module]:
    """The config and its generator with as many classes as the one in a place; raises RearError as `class_count`."""
    config = config.copy_and_resolve_references()
    config.data.num_classes = class_count(place, config, network)
    return config, network.clone(num_classes=config.data.num_classes)


def with_new_classes(params: Any, config: ConfigDict, network: nn.Module) -> Any:
    """Parameters of a generator with other classes as those of the config's `network`.

    Numbers of classes do not tell which ones they are, so all start as a fresh network has them. What stands for no
    class, which guidance asks for, stays.
    """
    family = generators.family_of(network)
    name, shapes = family.class_table, family.shapes(network)
    places = sharding.shardings(shapes, make_mesh(config.mesh), family.parameters)
    start = shapes[name].shape[0] - network.num_classes - 1

    def renewed(table: jax.Array) -> jax.Array:
        fresh = family.init(network, config.seed)[name]
        return jnp.concatenate([table[:start], fresh[start:-1], table[-1:]])

    return {**params, name: jax.jit(renewed, out_shardings=places[name])(params[name])}


def _recorded(record: dict, otherwise: int) -> int:
    """The number of classes in what is stored beside a checkpoint."""
    count = (record.get("data") or {}).get("num_classes")
    return count if isinstance(count, int) and count > 0 else otherwise
