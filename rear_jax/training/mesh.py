"""Placement of arrays on devices: parameters on all of them, batches split over them."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rear_jax.errors import RearError


def make_mesh() -> Mesh:
    """All devices of all processes along one axis, 'data'."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Any:
    """The global batch, split over all devices, from the part of it that this process has read."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def check_batch(batch_size: int, microbatches: int, name: str) -> None:
    """Raises RearError unless a batch divides evenly over microbatches and devices."""
    parts = microbatches * jax.device_count()
    if batch_size % parts:
        raise RearError(
            f"{name} = {batch_size} does not divide over {microbatches} microbatch(es) on {jax.device_count()} "
            f"device(s): choose a multiple of {parts}."
        )
