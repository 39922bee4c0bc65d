"""Frozen networks over streams of images or texts, on all devices of this process and of no other."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rear_jax.errors import RearError


def copied(params: Any) -> Any:
    """Host arrays as whole copies on every device of this process."""
    return jax.device_put(params, _placement())


def stream(function: Callable[[Any], Any], batches: Iterable[Any], *, size: int | None = None) -> Iterator[Any]:
    """What a function gives for each of a stream of batches, in order.

    The rows of a batch are divided over the devices. Smaller batches, as a last one may be, are padded and so compile
    nothing new. One batch is computed on the devices while the next is being read.

    Args:
      function: jitted, a batch [B, ...] to a tree of arrays [B, ...]; what else it reads was placed by `copied`.
      batches: images [b, H, W, 3], or trees of arrays [b, ...]; all of one dtype and but for b of one shape.
      size: of the largest batch; by default that of the first.

    Yields:
      The tree of each batch, [b, ...], on the host.

    Raises RearError: there are no batches, or one is larger than `size`.
    """
    devices, split = jax.local_device_count(), _placement("data")
    running: tuple[Any, int] | None = None
    for batch in batches:
        rows = len(jax.tree.leaves(batch)[0])
        size = size or rows
        if rows > size:
            raise RearError(f"A batch of {rows} rows follows a first one of {size}; give batches of one size.")
        padded = jax.tree.map(functools.partial(_filled, rows=-(-size // devices) * devices), batch)
        started = function(jax.device_put(padded, split)), rows
        if running:
            yield _fetch(*running)  # while the new batch runs
        running = started
    if not running:
        raise RearError("There are no images to look at; check the folder or the data set's split.")
    yield _fetch(*running)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """With rows of zeros at the end, so that there are so many."""
    missing = rows - len(array)
    return np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) if missing else array


def _placement(*axes: str) -> NamedSharding:
    """On all devices of this process: whole copies, or with the axis 'data' divided."""
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), devices=jax.local_devices(), axis_types=(AxisType.Auto,)
    )
    return NamedSharding(mesh, PartitionSpec(*axes))


def _fetch(outputs: Any, count: int) -> Any:
    return jax.tree.map(lambda array: np.asarray(array)[:count], outputs)
