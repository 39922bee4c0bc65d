"""Arrays as a compiled program's text writes them, such as 'bf16[8,258,768]{2,1,0:T(8,128)(2,1)S(1)}'."""

import dataclasses
import math
import re
from collections.abc import Sequence

BITS = {"pred": 8, "token": 0, "opaque": 0}  # other element types carry theirs in the name: bf16, s32, f8e4m3fn, c64

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_TILES = re.compile(r"T((?:\([\d,]+\))+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result.

    Attributes:
      dims: its shape.
      size: in bytes as it is laid out, with what fills its last tiles.
      main: whether it lies in the chip's main memory (not in a cache).
    """

    dims: tuple[int, ...]
    size: int
    main: bool


def arrays(text: str) -> tuple[Array, ...]:
    """Every array in a text."""
    return tuple(_array(*found) for found in _ARRAY.findall(text))


def _array(kind: str, dims: str, layout: str) -> Array:
    bits = BITS[kind] if kind in BITS else int(re.search(r"\d+", kind)[0])
    shape = _numbers(dims)
    return Array(shape, -(-_elements(shape, layout) * bits // 8), "S(" not in layout)


def _elements(shape: Sequence[int], layout: str) -> int:
    """Those of an array with its padding: each tile divides the last axes of what the one before it left."""
    order = _numbers(re.match(r"\{?([\d,]*)", layout)[1])  # the axis whose neighbours are neighbours in memory first
    axes = [shape[axis] for axis in reversed(order)] if order else list(shape)
    found = _TILES.search(layout)
    for tile in re.findall(r"[\d,]+", found[1]) if found else ():
        sizes = _numbers(tile)
        axes = [1] * (len(sizes) - len(axes)) + axes
        filled = zip(axes[-len(sizes) :], sizes, strict=True)
        axes = [*axes[: -len(sizes)], *(-(-axis // size) for axis, size in filled), *sizes]
    return math.prod(axes)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
