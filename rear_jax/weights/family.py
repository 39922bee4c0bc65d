"""A network family as everything else sees it: one record that says all there is to know of it."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.runtime.sharding import Rules
from rear_jax.weights.layout import Layout

ToEightBit = Callable[[jax.Array], jax.Array]


def truncate(images: jax.Array) -> jax.Array:
    """Floats in [0, 1], of any shape, to uint8 as RAR's code does it: 255 clip(x, 0, 1) without its fraction."""
    return (255.0 * jnp.clip(images.astype(jnp.float32), 0.0, 1.0)).astype(jnp.uint8)


def round_half_up(images: jax.Array) -> jax.Array:
    """Floats in [0, 1], of any shape, to uint8 as LlamaGen's code does it.

    That is clip(127.5 y + 128, 0, 255) without its fraction, of y in [-1, 1]; with x = (y + 1) / 2 it is 255 x + 0.5.
    """
    return jnp.clip(255.0 * images.astype(jnp.float32) + 0.5, 0.0, 255.0).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Family:
    """What generator and tokenizer families have in common.

    Attributes:
      name: `name` in the config section of its kind.
      network: the Flax module.
      derived: attributes of `network` that follow from other settings. The others are the keys of the config section;
        the module documents them and has their defaults, those of a published network.
      dtype: the default of the key `dtype`.
      layout: of the published files.
      parameters: sharding and weight decay of every parameter.
      to_8_bit: floats in [0, 1] to 8-bit images as the authors do it.
      extent: settings that tell the published sizes apart.
      published: values of these settings -> name of the published network and its million parameters.
    """

    KIND: ClassVar[str]  # what checkpoints call it
    SECTION: ClassVar[str]  # of the config

    name: str
    network: type[nn.Module]
    layout: Layout
    parameters: Rules
    to_8_bit: ToEightBit
    derived: tuple[str, ...] = ()
    dtype: str = "float32"
    extent: tuple[str, ...] = ()
    published: Mapping[tuple, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def section(self) -> ConfigDict:
        """The config section with its defaults."""
        defaults = {field.name: field.default for field in self.settings()}
        return ConfigDict({"name": self.name, **defaults, "dtype": self.dtype})

    def settings(self) -> list[dataclasses.Field]:
        """The attributes of the module that are keys of the config section."""
        known = {*self.derived, "name", "parent"}
        return [field for field in dataclasses.fields(self.network) if field.name not in known]

    def published_size(self, sizes: Mapping[str, Any]) -> tuple[str, float | None]:
        """Name and million parameters of a network of such sizes (keys of the config section), as published."""
        values = (sizes.get(setting) for setting in self.extent)
        key = tuple(tuple(value) if isinstance(value, list | tuple) else value for value in values)
        return self.published.get(key, (f"a {self.name} of no published size", None))


def discover(package: str, path: list[str]) -> dict[str, Any]:
    """Name -> record of every family in a package: of each module or folder that has a `FAMILY`."""
    modules = (importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path))
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def network_attributes(family: Family, section: ConfigDict) -> dict[str, Any]:
    """The attributes of a family's module that its config section holds, `dtype` as a type.

    Raises RearError: the section lacks a key or has one too many.
    """
    wanted = {field.name for field in family.settings()}
    if wrong := sorted(wanted ^ (set(section) - {"name"})):
        where = f"config.{family.SECTION} {family.name!r}"
        raise RearError(f"{where} takes exactly the keys {', '.join(sorted(wanted))}: mend {', '.join(wrong)}.")
    values = {key: tuple(section[key]) if isinstance(section[key], list) else section[key] for key in wanted}
    return values | {"dtype": jnp.dtype(section.dtype)}


def known(families: Mapping[str, Any], section: ConfigDict, where: str) -> Any:
    """The record of the family that a config section names; raises RearError where there is no such family."""
    if section.name not in families:
        raise RearError(f"{where}.name = {section.name!r}: use one of {', '.join(sorted(families))}.")
    return families[section.name]
