"""Frozen networks over streams of images, on all devices of this process and of no other."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rear_jax.errors import RearError


def copied(params: Any) -> Any:
    """Host arrays as whole copies on every device of this process."""
    return jax.device_put(params, _placement())


def stream(
    function: Callable[[jax.Array], Any], batches: Iterable[np.ndarray], *, size: int | None = None
) -> Iterator[Any]:
    """What a function gives for each of a stream of image batches, in order.

    The rows of a batch are divided over the devices. Smaller batches, as a last one may be, are padded and so compile
    nothing new. One batch is computed on the devices while the next is being read.

    Args:
      function: jitted, images [B, H, W, 3] to a tree of arrays [B, ...]; what else it reads was placed by `copied`.
      batches: arrays [b, H, W, 3] of one H, W and dtype.
      size: of the largest batch; by default that of the first.

    Yields:
      The tree of each batch, [b, ...], on the host.

    Raises RearError: there are no images, or a batch is larger than `size`.
    """
    devices, split = jax.local_device_count(), _placement("data")
    running: tuple[Any, int] | None = None
    for batch in batches:
        size = size or len(batch)
        if len(batch) > size:
            raise RearError(f"A batch of {len(batch)} images follows a first one of {size}; give batches of one size.")
        missing = -(-size // devices) * devices - len(batch)
        padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else batch
        started = function(jax.device_put(padded, split)), len(batch)
        if running:
            yield _fetch(*running)  # while the new batch runs
        running = started
    if not running:
        raise RearError("There are no images to look at; check the folder or the data set's split.")
    yield _fetch(*running)


def _placement(*axes: str) -> NamedSharding:
    """On all devices of this process: whole copies, or with the axis 'data' divided."""
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), devices=jax.local_devices(), axis_types=(AxisType.Auto,)
    )
    return NamedSharding(mesh, PartitionSpec(*axes))


def _fetch(outputs: Any, count: int) -> Any:
    return jax.tree.map(lambda array: np.asarray(array)[:count], outputs)
