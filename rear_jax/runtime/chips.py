"""Peak numbers of chips from their makers' pages, and which of them a device is."""

import dataclasses
import re
from collections.abc import Mapping

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
TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
OTHER_BOARDS = ("pcie", "nvl")  # slower than the SXM boards of the same name


def of_kind(kind: str) -> Chip | None:
    """The chip of a jax device by its `device_kind`; None where its numbers are not known here, as of CPUs."""
    words = re.findall(r"\w+", kind.lower())
    if set(words) & set(OTHER_BOARDS):
        return None
    known = TPUS.get(TPU_KINDS.get(kind, ""))
    return known or next((board for name, board in GPUS.items() if name in words), None)
