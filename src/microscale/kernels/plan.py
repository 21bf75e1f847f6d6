"""What a cast needs to know besides the values, resolved and checked once.

The public verbs and the fake kernels both make a `Plan`, so eager and compiled calls refuse the
same input with the same words.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat, channel_dimension, row_dimension
from microscale.rounding import Options, Overflow
from microscale.spelling import get_block_format

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class Plan:
    """A format, a checked axis (0 or more), and the options of one cast."""

    format: BlockFormat
    axis: int
    options: Options

    @classmethod
    def of(cls, fmt: str | BlockFormat, axis: int) -> "Plan":
        """The plan that decodes: no options matter."""
        return cls(get_block_format(fmt), axis, Options())

    def rows(self, dimensions: int) -> int | None:
        """The dimension that the rows of a tile run along, if blocks are tiles of a matrix."""
        if not isinstance(self.format.block, tuple):
            return None
        return row_dimension(dimensions, self.axis)

    def reduced(self, dimensions: int) -> tuple[int, ...]:
        """The dimensions that share one scale, for blocks that are as long as the data."""
        if self.format.block == "token":
            return (self.axis,)
        kept = channel_dimension(dimensions, self.axis) if self.format.block == "channel" else None
        return tuple(d for d in range(dimensions) if d != kept or dimensions == 1)


def plan(x: torch.Tensor, fmt: str | BlockFormat, axis: int, options: Options) -> Plan:
    """Check a cast of `x` and resolve its arguments. Raises MicroscaleError."""
    if x.dtype not in FLOATS:
        raise MicroscaleError(
            f"x has dtype {x.dtype}; casts take {', '.join(map(str, FLOATS))}. "
            "Convert it first, for example with x.float()."
        )
    if x.layout is not torch.strided:
        raise MicroscaleError(f"x has layout {x.layout}; convert it first with x.to_dense().")
    return Plan(_castable(fmt, options), check_axis(axis, x.dim()), options)


def check_axis(axis: int, dimensions: int) -> int:
    """Return the axis as a number from 0, or raise; zero-dimensional tensors have axis 0."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise MicroscaleError(f"axis {axis!r} is not an integer.")
    dimensions = max(dimensions, 1)
    if not -dimensions <= axis < dimensions:
        raise MicroscaleError(
            f"axis {axis} does not exist in a tensor of {dimensions} dimension(s); "
            f"use {-dimensions} to {dimensions - 1}."
        )
    return axis % dimensions


@lru_cache(maxsize=1024)
def _castable(spelling: str | BlockFormat, options: Options) -> BlockFormat:
    """The format, if it can be cast with these options."""
    fmt = get_block_format(spelling)
    element = fmt.element
    if options.overflow is Overflow.NONFINITE and not (element.has_inf or element.has_nan):
        raise MicroscaleError(
            f"overflow='nonfinite' needs infinity or NaN, and {element} has neither; "
            "use overflow='saturate'."
        )
    return fmt
