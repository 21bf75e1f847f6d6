"""Block formats: an element format, a scale format, a block shape and a scale rule."""

import math
import typing
from dataclasses import dataclass, field
from typing import Literal

from microscale.errors import MicroscaleError, near_names
from microscale.formats.concrete import CONCRETE
from microscale.formats.element import E2M1, ElementFormat
from microscale.formats.scale import E8M0, FP32, UNIT, ScaleFormat
from microscale.formats.shape import channel_dimension, packed_bytes, row_dimension
from microscale.rounding import ScaleRule

WholeBlock = Literal["channel", "token", "tensor"]
"""Blocks as long as the data: one scale per output channel, per token, for the whole tensor."""

WHOLE_BLOCKS: tuple[WholeBlock, ...] = ("channel", "token", "tensor")
LARGEST_BLOCK = 2**15
"""Rows are stored as whole blocks; for longer ones there are whole blocks, such as "token"."""


def _check_parts(element: object, scale: object) -> None:
    if not isinstance(element, ElementFormat) or not isinstance(scale, ScaleFormat):
        raise MicroscaleError(
            f"a block format is made of an ElementFormat and a ScaleFormat, not of {element!r} and "
            f"{scale!r}; get_format reads spellings."
        )


def _check_block(block: object) -> None:
    if isinstance(block, str):
        if block not in WHOLE_BLOCKS:
            raise MicroscaleError(f"block {block!r} is not known.{near_names(block, WHOLE_BLOCKS)}")
        return
    sizes = block if isinstance(block, tuple) and len(block) == 2 else (block,)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise MicroscaleError(
                f"block {block!r} is not a number of values, a pair of them, or one of "
                f"{', '.join(WHOLE_BLOCKS)}."
            )
        if size < 1:
            raise MicroscaleError(f"block size {size} is not positive; MX uses 32.")
        if size > LARGEST_BLOCK:
            raise MicroscaleError(
                f"block size {size} is over {LARGEST_BLOCK}; 'token' spans the whole axis."
            )


ZERO_POINT = "zero_point"
"""The option of a spelling that gives integers a zero point."""

ZERO_POINT_BITS = 8
"""What one zero point takes in memory, whatever the width of the integers."""

_NAMES: dict[object, str] = {parts: name for name, parts in CONCRETE.items()}


def element_spelling(element: ElementFormat) -> str:
    """The element's name as block formats spell it: `fp8_e4m3`, `int8`."""
    return element.name if element.is_integer else f"fp{element.bits}_{element.name}"


def default_scale(
    block: int | tuple[int, int] | WholeBlock, zero_point: bool = False
) -> ScaleFormat:
    """The scale format meant when a spelling names none."""
    return FP32 if isinstance(block, str) or zero_point else E8M0


@dataclass(frozen=True)
class BlockFormat:
    """An element format, a scale format, a block shape and a scale rule.

    `block` is a number of values along the cast's axis, a tile `(rows, columns)`, or the name of a
    whole block. A tile's columns run along the cast's axis and its rows along the other dimension
    of the matrix: `row_dimension`. `rule` defaults to the scale's own. `tensor_scale` is a second,
    outer scale for the whole tensor (NVFP4). `zero_point` gives each block of integers one that
    stands for zero, so that the whole range of codes spans its values.
    """

    element: ElementFormat
    scale: ScaleFormat
    block: int | tuple[int, int] | WholeBlock
    rule: ScaleRule = typing.cast("ScaleRule", None)  # noqa: RUF009 (None: the scale's own rule)
    tensor_scale: ScaleFormat | None = None
    zero_point: bool = False
    name: str = field(init=False, compare=False, repr=False)
    """The spelling that `get_format` reads back."""

    def __post_init__(self) -> None:
        """Check that the parts fit together; fill in the default rule."""
        _check_parts(self.element, self.scale)
        given = typing.cast("ScaleRule | None", self.rule)
        rule = self.scale.default_rule if given is None else ScaleRule(given)
        object.__setattr__(self, "rule", rule)
        fits = [r for r in ScaleRule if r.is_power_of_two == self.scale.is_power_of_two]
        if self.scale == UNIT:
            fits = [self.scale.default_rule]  # there is nothing to choose
        if rule not in fits:
            raise MicroscaleError(
                f"scale rule {rule} does not apply to the scale format {self.scale}; "
                f"use {' or '.join(fits)}."
            )
        if rule is ScaleRule.FOUR_OVER_SIX and self.element != E2M1:
            raise MicroscaleError(
                f"scale rule {rule} is a choice between the values 6 and 4 of e2m1, not for "
                f"{self.element}; use {ScaleRule.AMAX}."
            )
        _check_block(self.block)
        if self.tensor_scale is not None and (
            self.tensor_scale.is_power_of_two or self.scale.is_power_of_two
        ):
            raise MicroscaleError("a tensor scale needs real-valued scales, as in nvfp4.")
        if self.zero_point:
            self._check_zero_point()
        if self.scale.value is not None:
            self._check_settled()
        object.__setattr__(self, "name", self._spell())

    def _check_zero_point(self) -> None:
        if not self.element.is_integer or self.element.specials != "finite":
            raise MicroscaleError(
                f"a zero point is for integers such as int8, not for {self.element}; "
                "their whole range of codes is used then."
            )
        if self.scale.is_power_of_two or self.tensor_scale is not None:
            raise MicroscaleError(
                f"a zero point needs a real-valued scale of its own, such as {FP32}, not "
                f"{self.tensor_scale or self.scale}."
            )

    def _check_settled(self) -> None:
        zero = self.scale.zero
        if self.block != "tensor":
            raise MicroscaleError(
                f"scale {self.scale} is settled for a whole tensor; use the block 'tensor', not "
                f"{self.block!r}."
            )
        if (zero is not None) != self.zero_point:
            raise MicroscaleError(
                f"scale {self.scale}: a settled zero and {ZERO_POINT} go together, as in "
                f"int8-tensor-at0.5z12-{ZERO_POINT}."
            )
        if zero is not None and not 0 <= zero < 1 << self.element.bits:
            raise MicroscaleError(
                f"scale {self.scale}: zero is to be one of the {1 << self.element.bits} codes of "
                f"{self.element}, counted from 0."
            )

    def _spell(self) -> str:
        parts = (self.element, self.scale, self.block, self.tensor_scale)
        base = _NAMES.get(parts)
        if base is None:
            block = (
                self.block if not isinstance(self.block, tuple) else "x".join(map(str, self.block))
            )
            base = f"{element_spelling(self.element)}-{block}"
            if self.scale != default_scale(self.block, self.zero_point):
                base += f"-{self.scale}"
            if self.tensor_scale is not None:
                base += f"-tensor_{self.tensor_scale}"
        if self.zero_point:
            base += f"-{ZERO_POINT}"
        return base if self.rule == self.scale.default_rule else f"{base}-{self.rule}"

    def __str__(self) -> str:
        """Return the spelling."""
        return self.name

    @property
    def bits_per_value(self) -> float:
        """Bits per value, scales included, for axes that are multiples of the block.

        Whole blocks share one scale among as many values as the data has, so there the element
        alone counts; `storage_bits` gives the exact number for a shape.
        """
        if isinstance(self.block, str):
            return float(self.element.bits)
        values = self.block if isinstance(self.block, int) else math.prod(self.block)
        shared = self.scale.bits + (self.element.bits if self.zero_point else 0)
        return self.element.bits + shared / values

    def storage_bits(self, shape: tuple[int, ...], axis: int = -1) -> int:
        """Exact bits of a tensor of `shape` packed along `axis`: codes, padding, scales."""
        shape = shape or (1,)
        axis %= len(shape)
        length, rows = shape[axis], math.prod(shape[:axis] + shape[axis + 1 :])
        codes = rows * packed_bytes(length, self.element.bits, self.padding) * 8
        outer = self.tensor_scale.bits if self.tensor_scale else 0
        shared = self.scale.stored_bits + (ZERO_POINT_BITS if self.zero_point else 0)
        return codes + self._scales(shape, axis) * shared + outer

    @property
    def counted(self) -> int:
        """Values of a block along the axis; 0 for blocks as long as the data."""
        if isinstance(self.block, str):
            return 0
        return self.block if isinstance(self.block, int) else self.block[1]

    @property
    def padding(self) -> int:
        """Rows are stored as multiples of this many codes."""
        return self.counted or 1

    def _scales(self, shape: tuple[int, ...], axis: int) -> int:
        if not math.prod(shape):
            return 0
        if self.block == "tensor":
            return 1
        if self.block == "channel":
            return shape[channel_dimension(len(shape), axis)] if len(shape) > 1 else 1
        sizes = list(shape)
        if isinstance(self.block, tuple) and (row := row_dimension(len(shape), axis)) is not None:
            sizes[row] = -(-shape[row] // self.block[0])
        sizes[axis] = 1 if self.block == "token" else -(-shape[axis] // self.padding)
        return math.prod(sizes)
