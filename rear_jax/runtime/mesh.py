"""The device mesh: batches are divided over its axes 'data' and 'fsdp', parameters over 'fsdp' and 'tensor'.

Which parameter is divided how is said in `sharding.py`, and what 'data' divides besides in `divided.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rear_jax.errors import RearError

AXES = ("data", "fsdp", "tensor")
DATA_PARALLEL = {"data": -1, "fsdp": 1, "tensor": 1}  # whole parameters on every device


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all processes along the three axes.

    Neighbours on 'tensor' and then on 'fsdp' are devices of one process where possible, and the batch's rows lie on the
    processes in their order, as `data.batches` deals them out.

    Args:
      sizes: `config.mesh`, devices along each axis; -1 takes the rest.
      devices: of all processes, equally many of each; by default those that jax has.

    Raises RearError: the sizes do not fit the devices, or a tensor-parallel group would span processes.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = mesh_shape(sizes, len(devices))
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % shape["tensor"]:
        raise RearError(
            f"config.mesh.tensor = {shape['tensor']} does not divide the {local} device(s) of a "
            "process: choose a divisor, and config.mesh.fsdp for the rest."
        )
    return Mesh(np.array(devices).reshape(*shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Devices along each axis, of `count` in all.

    Raises RearError: more than one axis is to take the rest, or the product is not `count`.
    """
    shape = {axis: sizes[axis] for axis in AXES}
    given = math.prod(size for size in shape.values() if size != -1)
    if list(shape.values()).count(-1) == 1 and given > 0 and count % given == 0:
        shape = {axis: count // given if size == -1 else size for axis, size in shape.items()}
    if min(shape.values()) < 1 or math.prod(shape.values()) != count:
        asked = ", ".join(f"{axis} = {size}" for axis, size in shape.items())
        raise RearError(f"config.mesh ({asked}) does not fit {count} device(s), its product; one size may be -1.")
    return shape


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis divided over the devices; those along 'tensor' share a part."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Any:
    """The global batch, split over the devices, from the part of it that this process has read."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def map_rows(function: Callable[[Any], Any], rows: Any, *, at_once: int) -> Any:
    """`jax.lax.map` over the batch axis inside a step: each device goes through rows of its own, `at_once` together.

    The plain map goes through all rows in turn, which every device then has to compute; so it is where the rows do not
    divide over the devices.

    Args:
      function: of one row, a tree of arrays without the batch axis.
      rows: a tree of arrays that lead with the batch axis, divided as `split` says, or whole on every device.
      at_once: how many rows of a device are computed together.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    devices = shape.get("data", 1) * shape.get("fsdp", 1)
    if len(jax.tree.leaves(rows)[0]) % devices:
        devices = 1

    def deal(x):  # [B, ...] -> [B / devices, devices, ...]
        return x.reshape(devices, -1, *x.shape[1:]).swapaxes(0, 1)

    mapped = jax.lax.map(jax.vmap(function), jax.tree.map(deal, rows), batch_size=at_once)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), mapped)


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """A whole array on the host, wherever its parts are; every process must ask for it."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def check_batch(
    sizes: Mapping[str, int], batch_size: int, microbatches: int, name: str, count: int | None = None
) -> None:
    """Raises RearError unless a batch divides evenly over microbatches and over the axes 'data' and 'fsdp'.

    Args:
      sizes: `config.mesh`.
      batch_size: over all devices.
      microbatches: of a batch.
      name: of the setting that says the batch size, for messages.
      count: of devices; by default as many as jax has.
    """
    shape = mesh_shape(sizes, count or jax.device_count())
    devices = shape["data"] * shape["fsdp"]
    if batch_size < 1 or batch_size % (microbatches * devices):
        raise RearError(
            f"{name} = {batch_size} does not divide over {microbatches} microbatch(es) on {devices} "
            f"device(s): choose a multiple of {microbatches * devices}."
        )
