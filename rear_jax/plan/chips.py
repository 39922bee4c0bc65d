"""Chips and how they are joined: devices to compile for."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jaxlib import xla_client

from rear_jax.errors import RearError
from rear_jax.runtime.chips import GIB as GIB
from rear_jax.runtime.chips import GPUS, TPUS, Chip

ABSENT = {  # what libtpu must know where it compiles without a TPU
    "TPU_SKIP_MDS_QUERY": "1",  # not to ask the cloud which TPU this host has
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is nothing that two processes could fight over
}
HOST_REASONS = {
    "libtpu": "libtpu is not installed (pip install 'jax[tpu]')",
    "gpu": "a GPU's compiler needs the GPU",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips to compile for.

    Attributes:
      name: as given, such as 'v5e:4x4'.
      chip: of which it is made.
      devices: one for each chip; compiled for, never run on.
      compiler: which one it is, for people.
      exact: whether it is that of the chip itself, so that memory and collectives are what they will be.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    compiler: str
    exact: bool

    @property
    def platform(self) -> str:
        """Of the chips, whatever stands in for them: 'tpu' or 'gpu'."""
        return "gpu" if self.chip in GPUS.values() else "tpu"

    @property
    def kind(self) -> str:
        """Of the chips, such as 'v5e'."""
        return self.name.partition(":")[0]

    def network(self, reach: int) -> float:
        """Bytes per second that a chip sends in a collective of such a `reach`: that of the slowest link it crosses."""
        return self.chip.outside if self.chip.node and reach > self.chip.node else self.chip.network


def topology(name: str) -> Topology:
    """The chips that a name such as 'v5e:16x16', 'v4:4x4x8' or 'h100:8' stands for.

    Where the chip's own compiler is not at hand, as many devices of the host stand in for them.

    Raises RearError: there is no such chip, or it is not joined in this shape.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = (TPUS | GPUS).get(found[1]) if found else None
    count = math.prod(map(int, found[2].split("x"))) if found else 0
    if chip is None or not count:
        raise RearError(
            f"config.plan.topology = {name!r} is none: give a chip of {', '.join((*TPUS, *GPUS))} and how many, "
            "such as v5e:16x16, v4:4x4x8 or h100:8."
        )
    if chip.most and count > chip.most:
        raise RearError(f"config.plan.topology = {name!r}: a slice of {found[1]} has at most {chip.most} chips.")
    if found[1] in TPUS and importlib.util.find_spec("libtpu"):
        version = importlib.metadata.version("libtpu")
        return Topology(name, chip, _tpus(name, chip, count), f"the TPU compiler, libtpu {version}", True)
    reason = HOST_REASONS["libtpu" if found[1] in TPUS else "gpu"]
    devices = xla_client.make_cpu_client(num_devices=count).devices()
    return Topology(name, chip, devices, f"the host's compiler: {reason}; memory and traffic are estimates", False)


def _tpus(name: str, chip: Chip, count: int) -> Sequence[jax.Device]:
    """Devices of a slice that need not be there."""
    os.environ.update(ABSENT)
    options = dict(chip.options) | ({"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {})
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except JaxRuntimeError as error:
        raise RearError(f"config.plan.topology = {name!r}: {str(error).splitlines()[0]}.") from error
