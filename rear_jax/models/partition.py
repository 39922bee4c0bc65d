"""How activations are divided over the mesh: hints to the compiler, which change no number.

Rows of a batch are divided over 'data' and 'fsdp'. Without that hint in every block the compiler may keep activations
divided as the parameters are, by features: it then adds up partial products over the devices, in proportion to the
batch, instead of gathering each block's parameters when it needs them (ZeRO, arXiv 1910.02054).
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES, HEAD_AXES = ("data", "fsdp"), ("tensor",)  # of the mesh, see rear_jax/training/mesh.py


def dividing(axes: tuple[str, ...], size: int, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Those axes of the mesh, where together they divide a dimension of this size; else none, so that it is whole."""
    axes = tuple(axis for axis in axes if axis in mesh_shape)
    return axes if size % math.prod(mesh_shape[axis] for axis in axes) == 0 else ()


def constrain(x: Float[Array, "..."], *axes: tuple[str, ...] | None) -> Float[Array, "..."]:
    """The same array, its dimensions divided over axes of the mesh that is in use.

    Args:
      x: any array.
      *axes: of each dimension: () = whole on every device; None, or axes that do not divide it = as the compiler likes.

    Returns:
      `x` itself outside a mesh and on one device.
    """
    mesh_shape = jax.sharding.get_abstract_mesh().shape
    if math.prod(mesh_shape.values()) == 1:
        return x

    def of(names, size):
        free = PartitionSpec.UNCONSTRAINED
        return free if names is None else () if not names else dividing(names, size, mesh_shape) or free

    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(of, axes, x.shape)))


def by_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """The same activations, each device with rows of its own and all of their features."""
    return constrain(x, BATCH_AXES, *((),) * (x.ndim - 1))


def by_heads(kernel: Float[Array, "... H D"]) -> Float[Array, "... H D"]:
    """The same array, each device of a tensor-parallel group with heads of its own."""
    return constrain(kernel, *(None,) * (kernel.ndim - 2), HEAD_AXES, None)
