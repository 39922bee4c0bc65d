"""Chips and how they are joined: peak numbers from their makers' pages, and devices to compile for."""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies
from jaxlib import xla_client

from rear_jax.errors import RearError

GIB = 2**30


PASSES = {"default": 1, "high": 3, "highest": 6}  # in bfloat16, by which a TPU makes a product of float32


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak numbers of one chip.

    Attributes:
      flops: bfloat16 operations per second, dense.
      float32: how many times longer products of float32 take, by their precision.
      memory: bytes of HBM that a program may fill.
      bandwidth: bytes per second between chip and HBM.
      network: bytes per second that it sends to its neighbours, all links together, one direction.
      node: chips that are joined at this speed; 0 = all.
      outside: the same beyond a node.
      most: chips of one slice; 0 = any number.
      options: of the topology that makes one device of one chip.
      clock: cycles per second; 0 where it is not known.
      cores: that share a kernel's grid.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float
    float32: Mapping[str, float] = dataclasses.field(default_factory=lambda: PASSES)
    node: int = 0
    outside: float = 0.0
    most: int = 0
    options: tuple[tuple[str, str], ...] = ()
    clock: float = 0.0
    cores: int = 1


# TPU: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; the network is half of "bidirectional ICI bandwidth per chip".
# Memory: what the compiler of libtpu 0.0.42 calls available, a little less than the 32, 16, 96 and 32 GiB there are.
# Clocks: arXiv 2304.01433 (v4); else peak = clock * cores * MXUs * side * side * 2, of 4 MXUs a core, with sides of 128
# or, on v6e, 256. Pages on v6e say 2 or 4 MXUs; with 2, a large product in libtpu's cost model would be
# faster than the peak.
TPUS = {
    "v4": Chip(
        flops=275e12,
        memory=30.75 * GIB,
        bandwidth=1.2288e12,
        network=300e9,
        most=4096,
        options=(("chip_config_name", "megacore"),),
        clock=1.05e9,
        cores=2,
    ),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, most=256, clock=1.5e9),
    "v5p": Chip(459e12, 95.74 * GIB, 2765e9, 600e9, most=6144, clock=1.75e9, cores=2),
    "v6e": Chip(918e12, 31.25 * GIB, 1638e9, 400e9, most=256, clock=1.75e9),
}
# GPU: NVIDIA's data sheets, SXM boards; the network is half of NVLink's total, beyond a node one 200 or 400 Gb/s card.
# 'default' and 'high' are TF32, half the bfloat16 rate; 'highest' is float32 outside the tensor cores.
AMPERE, HOPPER = ({"default": 2, "high": 2, "highest": slowest} for slowest in (312 / 19.5, 989 / 67))
GPUS = {
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, AMPERE, node=8, outside=25e9),
    "a800": Chip(312e12, 80e9, 2039e9, 200e9, AMPERE, node=8, outside=25e9),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, HOPPER, node=8, outside=50e9),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, HOPPER, node=8, outside=50e9),
}
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
