"""State that is divided over 'data' too, and the whole parameters that networks read of it (ZeRO, arXiv 1910.02054).

Each device keeps a part of the float32 parameters, of their moving average and of the optimiser's moments, and updates
that part. Networks read whole parameters. They are gathered once a step, whatever the number of microbatches. A kernel
is rounded before that to the dtype that it is multiplied in, so that half the bytes are sent, and no layer rounds it
again. Gradients are float32, and are added up on the device that has the part which they belong to.

Whole means as the rules of `sharding.py` say: what 'fsdp' and 'tensor' divide stays divided by them. The training loop
says by `dividing` what holds for its job; outside of it nothing is divided or rounded. No result depends on any of it.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from rear_jax.runtime import sharding
from rear_jax.runtime.precision import Prepared

AXES = ("data",)  # of the mesh, beside those of the rules


class Division(NamedTuple):
    """How the state of a training job is divided, and what its networks read of it.

    Attributes:
      rules: of its networks.
      axes: of the mesh that divide it beside those of the rules: AXES or ().
      dtype: in which `precision.multiply` multiplies every array called 'kernel'; None = not all of them are for it.
    """

    rules: sharding.Rules
    axes: tuple[str, ...] = ()
    dtype: Any = None

    def specs(self, path: str, shape: tuple[int, ...]) -> tuple[PartitionSpec, PartitionSpec]:
        """How a parameter lies on the mesh in use: whole, and as the state has it."""
        mesh_shape = jax.sharding.get_abstract_mesh().shape
        if not mesh_shape:
            return PartitionSpec(), PartitionSpec()
        whole = sharding.spec(path, shape, mesh_shape, self.rules)
        return whole, sharding.spec(path, shape, mesh_shape, self.rules, self.axes)

    def whole(self, path: str, leaf: jax.Array) -> jax.Array | Prepared:
        """A parameter as networks read it."""
        whole, parts = self.specs(path, leaf.shape)
        is_factor = self.dtype is not None and path.rpartition("/")[-1] == "kernel"
        if not is_factor or (whole == parts and leaf.dtype == self.dtype):
            return leaf if whole == parts else sharding.place(leaf, whole)
        factor = sharding.place(sharding.place(jax.lax.stop_gradient(leaf).astype(self.dtype), parts), whole)
        # devices of an fsdp group add up theirs first: fewer bytes are left for the groups to add up
        steps = (whole, parts) if _shares_rows(whole) else (parts,)
        covered = len(sharding.find(path, self.rules).axes)
        return Prepared(leaf, factor, tuple(tuple(spec)[-covered:] for spec in steps))

    def part(self, path: str, leaf: jax.Array) -> jax.Array:
        """A parameter, or the gradient of one, as the state has it."""
        whole, parts = self.specs(path, leaf.shape)
        return leaf if whole == parts else sharding.place(leaf, parts)


_DIVISION: contextvars.ContextVar[Division | None] = contextvars.ContextVar("division", default=None)


@contextlib.contextmanager
def dividing(division: Division) -> Iterator[None]:
    """Inside, what is traced is the step of a job whose state is divided so."""
    before = _DIVISION.set(division)
    try:
        yield
    finally:
        _DIVISION.reset(before)


def gather(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a step differentiates by, and what makes of it the parameters that networks take.

    The former are whole parameters; but of kernels, which only networks have whole, they are those of the state.
    """
    division = _DIVISION.get()
    if division is None:
        return params, lambda arrays: arrays
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    whole = [division.whole(sharding.name_of(path), leaf) for path, leaf in leaves]
    arrays = tree.unflatten([one.stored if isinstance(one, Prepared) else one for one in whole])

    def with_factors(arrays):
        pairs = zip(whole, tree.flatten_up_to(arrays), strict=True)
        return tree.unflatten(
            [dataclasses.replace(one, stored=a) if isinstance(one, Prepared) else a for one, a in pairs]
        )

    return arrays, with_factors


def scatter(gradients: Any) -> Any:
    """The same gradients, each device with those of the part that it updates."""
    division = _DIVISION.get()
    if division is None:
        return gradients
    return jax.tree_util.tree_map_with_path(lambda path, leaf: division.part(sharding.name_of(path), leaf), gradients)


def _shares_rows(spec: PartitionSpec) -> bool:
    """Whether an array is divided over devices that have rows of their own."""
    mesh_shape, axes = jax.sharding.get_abstract_mesh().shape, jax.tree.leaves(tuple(spec))
    return any(axis in sharding.BATCH_AXES and mesh_shape[axis] > 1 for axis in axes)
