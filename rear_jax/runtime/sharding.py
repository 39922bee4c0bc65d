"""What holds for which parameter: how the mesh divides it, and whether weight decay applies to it.

A rule is a regular expression, the mesh axes of an array's *last* dimensions, and a yes or no for weight decay. The
dimensions before the last ones are never divided: the layer axis of scanned blocks, the window of convolutions. The
first rule that is found in an array's path counts, and an array without a rule is an error. Every network family has a
table of its own. Optimiser state and moving averages hold arrays under the path of their parameter, so they follow it.

'fsdp' divides parameters that each device gathers when it needs them (ZeRO, arXiv 1910.02054). 'tensor' divides the
transformers as Megatron-LM does (arXiv 1909.08053): the first linear layer of a pair by columns or by heads, the second
by rows, embeddings and head by vocabulary.

Activations follow by hints to the compiler, which change no number. Rows of a batch are divided over 'data' and 'fsdp'.
Without that hint in every block the compiler may keep activations divided as the parameters are, by features: it then
adds up partial products over the devices, in proportion to the batch, instead of gathering each block's parameters.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rear_jax.errors import RearError

BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)  # of the mesh, see mesh.py
COLUMNS, ROWS, WHOLE = ("fsdp", "tensor"), ("tensor", "fsdp"), ()


class Rule(NamedTuple):
    """What holds for the arrays in whose path a regular expression is found.

    Attributes:
      pattern: the expression; paths are names from the root of the tree, joined by '/'.
      axes: mesh axes of the last dimensions, each a name, several names, or None.
      decays: whether weight decay applies.
    """

    pattern: str
    axes: tuple[str | tuple[str, ...] | None, ...] = WHOLE
    decays: bool = False


Rules = tuple[Rule, ...]


def whole_frozen(*divided: str) -> Rule:
    """What a training step reads and does not change is whole on every device, but for the entries named here."""
    return Rule(rf"^frozen/(?!({'|'.join(divided)})/)" if divided else r"^frozen/")


def within(root: str, rules: Rules) -> Rules:
    """Rules of a network for its parameters under a path alone."""
    return tuple(rule._replace(pattern=rf"^{root}(?=/).*?(?:{rule.pattern})") for rule in rules)


def split_columns(*layers: str, decays: bool = True) -> Rules:
    """Linear layers, by name, whose output features are divided."""
    names = "|".join(layers)
    return Rule(rf"(^|/)({names})/kernel$", COLUMNS, decays), Rule(rf"(^|/)({names})/bias$", ("tensor",))


def split_rows(*layers: str) -> Rules:
    """Linear layers, by name, whose input features are divided."""
    names = "|".join(layers)
    return Rule(rf"(^|/)({names})/kernel$", ROWS, decays=True), Rule(rf"(^|/)({names})/bias$")


def find(path: str, rules: Rules) -> Rule:
    """The rule of an array; raises RearError where there is none."""
    found = next((rule for rule in rules if re.search(rule.pattern, path)), None)
    if found is None:
        raise RearError(f"no rule of sharding and weight decay fits {path}: add one to the `parameters` of its family.")
    return found


def spec(
    path: str, shape: tuple[int, ...], mesh_shape: Mapping[str, int], rules: Rules, also: tuple[str, ...] = ()
) -> PartitionSpec:
    """How one array is divided. A dimension that its axes do not divide stays whole, and so do scalars.

    Args:
      path: names from the root of the tree, joined by '/'.
      shape: of the array.
      mesh_shape: devices along each axis.
      rules: of the networks in the tree.
      also: axes that divide the array besides: the first dimension of its rule that they divide further, else the last
        other one that they divide, else none.

    Raises RearError: no rule matches, or the rule is for arrays of more dimensions.
    """
    if not shape:
        return PartitionSpec()
    axes = find(path, rules).axes
    others = len(shape) - len(axes)
    if others < 0:
        raise RearError(f"the sharding rule of {path} {list(shape)} names {len(axes)} dimensions: mend its family.")
    placed = [a if divides(a, n, mesh_shape) else None for a, n in zip((None,) * others + axes, shape, strict=True)]
    if math.prod(mesh_shape[axis] for axis in also) > 1:
        for dimension in (*range(others, len(shape)), *reversed(range(others))):
            further = (*_names(placed[dimension]), *also)
            if divides(further, shape[dimension], mesh_shape):
                placed[dimension] = further
                break
    return PartitionSpec(*placed)


def shardings(tree: Any, mesh: Mesh, rules: Rules, root: str = "", also: tuple[str, ...] = ()) -> Any:
    """The sharding of every array of a tree, or of their shapes.

    Args:
      tree: arrays or shapes.
      mesh: of the devices.
      rules: of the networks in the tree.
      root: what their paths begin with, such as 'frozen/'.
      also: see `spec`.
    """

    def of(path, leaf):
        return NamedSharding(mesh, spec(root + name_of(path), leaf.shape, mesh.shape, rules, also))

    return jax.tree_util.tree_map_with_path(of, tree)


def decay_mask(params: Any, rules: Rules) -> Any:
    """True where weight decay applies, by the rules; raises RearError for a parameter without a rule."""
    return jax.tree_util.tree_map_with_path(lambda path, _: find(name_of(path), rules).decays, params)


def bytes_per_device(tree: Any, placed: Any) -> int:
    """What a tree of arrays or shapes takes on each device, under one sharding or a tree of them."""
    placed = jax.tree.broadcast(placed, tree)
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))


def name_of(path: Any) -> str:
    """A path of `jax.tree_util` as the rules read it: names joined by '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def divides(axes: str | tuple[str, ...] | None, size: int, mesh_shape: Mapping[str, int]) -> bool:
    """Whether the devices along one or several axes of the mesh, together, divide a dimension of this size."""
    return size % math.prod(mesh_shape[name] for name in _names(axes)) == 0


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def dividing(axes: tuple[str, ...], size: int, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Those of the axes that the mesh has, if they divide a dimension of this size; else none, so that it is whole."""
    axes = tuple(axis for axis in axes if axis in mesh_shape)
    return axes if divides(axes, size, mesh_shape) else ()


def devices_along(axes: tuple[str, ...]) -> int:
    """How many devices there are along some axes of the mesh that is in use, together."""
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh_shape.get(axis, 1) for axis in axes)


def is_divided(axes: tuple[str, ...]) -> bool:
    """Whether there are several of them."""
    return devices_along(axes) > 1


def constrain(x: Float[Array, "..."], *axes: tuple[str, ...] | None) -> Float[Array, "..."]:
    """The same array, its dimensions divided over axes of the mesh that is in use.

    Args:
      x: any array.
      *axes: of each dimension: () = whole on every device; None, or axes that do not divide it = as the compiler likes.

    Returns:
      `x` itself outside a mesh and on one device.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape

    def of(names, size):
        free = PartitionSpec.UNCONSTRAINED
        return free if names is None else () if not names else dividing(names, size, mesh_shape) or free

    return place(x, PartitionSpec(*map(of, axes, x.shape)))


def place(x: Float[Array, "..."], spec: PartitionSpec) -> Float[Array, "..."]:
    """The same array, divided so over the mesh that is in use; itself outside a mesh and on one device."""
    several = math.prod(jax.sharding.get_abstract_mesh().shape.values()) > 1
    return jax.lax.with_sharding_constraint(x, spec) if several else x


def gathered(params: Any, rules: Rules) -> Any:
    """The same parameters, whole where 'fsdp' divides them; what 'tensor' divides stays divided.

    For loops that read them again and again: otherwise the devices exchange weights or activations in every step.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape

    def of(path, leaf):
        parts = spec(name_of(path), leaf.shape, mesh_shape, rules)
        whole = PartitionSpec(*(tuple(axis for axis in _names(axes) if axis != "fsdp") or None for axes in parts))
        return place(place(leaf, parts), whole)  # it comes as parts: what was done to it before is done to parts

    return jax.tree_util.tree_map_with_path(of, params) if mesh_shape.get("fsdp", 1) > 1 else params


def by_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The same activations, each device with rows of its own and all of their features."""
    return constrain(x, BATCH_AXES, *((),) * (x.ndim - 1))


def by_heads(kernel: Float[Array, "... H D"]) -> Float[Array, "... H D"]:
    """The same array, each device of a tensor-parallel group with heads of its own."""
    return constrain(kernel, *(None,) * (kernel.ndim - 2), HEAD_AXES, None)
