"""The record of a generator family, and the generator that a config describes."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rear_jax.errors import RearError
from rear_jax.generators.attention_kernels import KERNELS
from rear_jax.generators.cached import CachedGenerator
from rear_jax.generators.layers import PROJECTORS
from rear_jax.generators.stack import REMAT
from rear_jax.weights.family import Family

CHOICES = {"remat": REMAT, "attention": KERNELS}  # settings that several families have, and their values
TAPS, ORDERS, CAPTIONS, TOKENS = "taps", "orders", "captions", "tokens"  # what a family may offer
MEANING = {
    TAPS: "projections of hidden states (taps)",
    ORDERS: "codes in random orders",
    CAPTIONS: "conditions that are captions",
    TOKENS: "conditions that are tokens of text",
}


@dataclasses.dataclass(frozen=True)
class GeneratorFamily(Family):
    """All there is to know of a family of generators.

    The module maps codes [B, N] and conditions of B sequences (and orders [B, N], where it offers them) to
    `interface.Features`. It has the attributes `codebook_size`, `num_classes` and `num_codes`, with taps those of
    `tap_attributes`, and else the keys of its config section.

    Attributes:
      cached: makes the cached form of the module.
      offers: (config section, or the module) -> what the generator can do, each with the setting that switches it on,
        '' where it is on.
      needs_grid: whether the codes must form a square grid.
      check: (config, codes per image) raises RearError where sizes or settings do not fit together.
      condition: makes the condition of one sequence, all zero, from the module: a label, one caption, or one prompt.
      unconditional: (module, parameters, conditions) -> what takes their place where they are dropped.
      class_table: the parameter that ends with a row for each class, by number, and one for no class; '' where there is
        none.
      multiplies: whether every array called 'kernel' is a factor of `precision.multiply`, in the module's `dtype`; then
        a training step rounds and gathers it once, see `runtime/divided.py`.
    """

    KIND: ClassVar[str] = "generator"
    SECTION: ClassVar[str] = "model"

    derived: tuple[str, ...] = (
        *("codebook_size", "num_classes", "num_codes"),  # from tokenizer and data
        *("projector", "projector_width", "embedding_dim", "shallow_layer", "deep_layer"),  # from the method
    )
    dtype: str = "bfloat16"
    cached: Callable[[nn.Module], CachedGenerator] = CachedGenerator
    offers: Callable[[Any], Mapping[str, str]] = lambda section: {}
    needs_grid: bool = False
    check: Callable[[ConfigDict, int], None] = lambda config, num_codes: None
    condition: Callable[[nn.Module], Any] = lambda network: jnp.zeros(1, jnp.int32)
    unconditional: Callable[[nn.Module, Any, Any], Any] = lambda network, params, labels: jnp.full_like(
        labels, network.num_classes
    )
    class_table: str = ""
    multiplies: bool = False

    def factor_dtype(self, network: nn.Module) -> Any:
        """Of what a training step rounds in advance; None = nothing."""
        return network.dtype if self.multiplies else None

    def offers_now(self, network: nn.Module, what: str) -> bool:
        """Whether a generator of this family can do something as it is set up."""
        return self.offers(network).get(what) == ""

    def example_inputs(self, network: nn.Module) -> tuple[jax.Array, Any]:
        """Codes and condition of one sequence, all zero: what `network.init` needs to see."""
        return jnp.zeros((1, network.num_codes), jnp.int32), self.condition(network)

    def condition_shapes(self, network: nn.Module, rows: int) -> Any:
        """Shapes of what `rows` sequences are conditioned on."""
        one = self.condition(network)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), one)

    def init(self, network: nn.Module, seed: int) -> Any:
        """Fresh parameters of one of its generators."""
        return network.init(jax.random.key(seed), *self.example_inputs(network))["params"]

    def shapes(self, network: nn.Module) -> Any:
        """Shapes of the parameters of one of its generators."""
        return jax.eval_shape(lambda: self.init(network, 0))


def check_settings(family: GeneratorFamily, config: ConfigDict, tokenizer: nn.Module, needs: Collection[str]) -> None:
    """Raises RearError where the generator cannot be built, has not what is needed, or does not suit the tokenizer."""
    model = config.model
    for name, choices in CHOICES.items():
        if name in model and model[name] not in choices:
            raise RearError(f"config.model.{name} = {model[name]!r}: use one of {', '.join(choices)}.")
    if "heads" in model and model.width % model.heads:
        raise RearError(f"config.model.width = {model.width} is not divisible by config.model.heads = {model.heads}.")
    offered = family.offers(model)
    for need in needs:
        if offered.get(need, family.name):
            remedy = f"set {offered[need]}" if need in offered else "use another method, or another model"
            raise RearError(
                f"config.method.name = {config.method.name!r} needs {MEANING[need]}, which config.model.name = "
                f"{family.name!r} has not: {remedy}."
            )
    if family.needs_grid and tokenizer.grid[0] == 1:
        raise RearError(
            f"config.model.name = {family.name!r} needs a grid of codes, which config.tokenizer.name = "
            f"{config.tokenizer.name!r} has not: use another model, or another tokenizer."
        )
    family.check(config, tokenizer.codes_per_image)


def tap_attributes(config: ConfigDict, embedding_dim: int, *, wanted: bool) -> dict[str, Any]:
    """Attributes of a generator that offers taps.

    Args:
      config: the experiment.
      embedding_dim: D, width of the codebook's vectors.
      wanted: whether hidden states are to be projected.

    Raises RearError: the projector is unknown, or there is no such layer.
    """
    method, depth = config.method, config.model.depth
    if wanted and method.projector not in PROJECTORS:
        raise RearError(f"config.method.projector = {method.projector!r}: use one of {', '.join(PROJECTORS)}.")
    deep = 3 * depth // 4 if method.deep_layer == -1 else method.deep_layer
    layers = {"shallow_layer": method.shallow_layer, "deep_layer": deep}
    for name, layer in layers.items():
        if wanted and not 0 <= layer < depth:
            raise RearError(f"config.method.{name} = {layer} is not a layer of 0..{depth - 1}.")
    projector = {"projector": method.projector if wanted else "none", "projector_width": method.projector_width}
    return projector | layers | {"embedding_dim": embedding_dim}
