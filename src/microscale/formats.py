"""Formats as data. Every number about a format is written here once; the rest is derived.

An element format is the grid of one value; a scale format is the grid of the shared scale; a
block format joins the two with a block shape and a scale rule. Kernels, checkpoints and
documentation receive these records or the numbers derived from them.

Sources: OCP Microscaling Formats (MX) v1.0, tables 1 to 7; OCP OFP8 v1.0 for E4M3 and E5M2;
arXiv 2309.17224 for the `fnuz` kind; NVIDIA Transformer Engine documentation for NVFP4.
"""

import math
import struct
import typing
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Literal

from microscale.errors import MicroscaleError, near_names
from microscale.rounding import ScaleRule

Specials = Literal["finite", "fn", "fnuz", "ieee", "full"]
"""Which codes are not numbers: none; one NaN magnitude; the code of -0; the top exponent.

Integers are `finite`, or `full` if they use the most negative code too."""

WholeBlock = Literal["channel", "token", "tensor"]
"""Blocks as long as the data: one scale per output channel, per token, for the whole tensor."""

WHOLE_BLOCKS: tuple[WholeBlock, ...] = ("channel", "token", "tensor")
FLOAT_SPECIALS: tuple[Specials, ...] = ("finite", "fn", "fnuz", "ieee")
INTEGER_SPECIALS: tuple[Specials, ...] = ("finite", "full")


@dataclass(frozen=True)
class ElementFormat:
    """The grid of one element.

    Floats (`exponent_bits > 0`) are sign-magnitude, with value (-1)^s 2^(E-bias) (1 + M/2^m), or
    2^(1-bias) M/2^m where the exponent field E is zero. Integers (`exponent_bits == 0`) are
    two's complement k with value k / 2^m (OCP MX 5.3.4: INT8 is k/64), symmetric: the most
    negative code is never produced, and decodes as its value; of the kind `full` it is produced.

    `mantissa_bits` counts the fraction bits; `bias` is the exponent bias (0 for integers).
    """

    exponent_bits: int
    mantissa_bits: int
    specials: Specials
    bias: int

    @property
    def is_integer(self) -> bool:
        """Whether codes are two's complement integers."""
        return self.exponent_bits == 0

    @property
    def bits(self) -> int:
        """Width of one code; integers have a sign and an integer bit before the fraction."""
        return self.mantissa_bits + 2 if self.is_integer else 1 + self.code_bits

    @property
    def code_bits(self) -> int:
        """Width of the magnitude part of a float's code."""
        return self.exponent_bits + self.mantissa_bits

    @cached_property
    def name(self) -> str:
        """The spelling that `get_format` reads back."""
        if self.is_integer:
            return f"int{self.bits}{'full' if self.specials == 'full' else ''}"
        usual = _usual_float(self.exponent_bits, self.mantissa_bits)
        bias = (
            f"b{self.bias}" if self.bias != _usual_bias(self.exponent_bits, self.specials) else ""
        )
        specials = self.specials if self.specials != usual.specials else ""
        return f"e{self.exponent_bits}m{self.mantissa_bits}{bias}{specials}"

    def __str__(self) -> str:
        """Return the spelling."""
        return self.name

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value; below it the grid is uniform."""
        return 0 if self.is_integer else 1 - self.bias

    @cached_property
    def emax(self) -> int:
        """Exponent of the largest finite value: floor(log2(largest))."""
        return math.frexp(self.largest)[1] - 1

    @cached_property
    def largest_code(self) -> int:
        """Code of the largest finite value."""
        if self.is_integer:
            return (1 << (self.bits - 1)) - 1
        if self.specials == "ieee":
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        return (1 << self.code_bits) - (2 if self.specials == "fn" else 1)

    @cached_property
    def largest(self) -> float:
        """Largest finite value."""
        return self._magnitude(self.largest_code)

    @property
    def lowest(self) -> float:
        """The most negative finite value that casts produce."""
        return -math.ldexp(1.0, 1) if self.specials == "full" else -self.largest

    @property
    def smallest_normal(self) -> float | None:
        """Smallest positive normal value; None for integers, whose grid is uniform."""
        return None if self.is_integer else math.ldexp(1.0, self.emin)

    @property
    def smallest(self) -> float:
        """Smallest positive value: the spacing of the grid at zero."""
        return self._magnitude(1)

    @property
    def smallest_subnormal(self) -> float | None:
        """Smallest positive subnormal value; None where there is none."""
        return self.smallest if self.mantissa_bits and not self.is_integer else None

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero carries a sign."""
        return not self.is_integer and self.specials != "fnuz"

    @property
    def inf_code(self) -> int | None:
        """Code of +infinity."""
        if self.is_integer or self.specials != "ieee":
            return None
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def nan_code(self) -> int | None:
        """Code of the NaN that casts produce (positive and quiet where there is a choice)."""
        if self.is_integer or self.specials == "finite":
            return None
        if self.specials == "fnuz":
            return 1 << self.code_bits
        # ieee: the top mantissa bit marks a quiet NaN; fn: the one NaN magnitude is all ones.
        quiet = ((1 << self.exponent_bits) - 1) << self.mantissa_bits | (
            1 << self.mantissa_bits >> 1
        )
        return quiet if self.specials == "ieee" else 2**self.code_bits - 1

    @property
    def has_inf(self) -> bool:
        """Whether infinity has a code."""
        return self.inf_code is not None

    @property
    def has_nan(self) -> bool:
        """Whether NaN has a code."""
        return self.nan_code is not None

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, in the order of the codes; NaN and infinities included."""
        return tuple(self._value(code) for code in range(1 << self.bits))

    def _value(self, code: int) -> float:
        if self.is_integer:
            signed = code - (1 << self.bits) if code >> (self.bits - 1) else code
            return math.ldexp(signed, -self.mantissa_bits)
        sign, magnitude = divmod(code, 1 << self.code_bits)
        if self.specials == "fnuz" and code == self.nan_code:
            return math.nan
        if magnitude == self.inf_code:
            return -math.inf if sign else math.inf
        if magnitude > self.largest_code:
            return math.nan
        return math.copysign(self._magnitude(magnitude), -1.0 if sign else 1.0)

    def _magnitude(self, code: int) -> float:
        if self.is_integer:
            return math.ldexp(code, -self.mantissa_bits)
        field, fraction = divmod(code, 1 << self.mantissa_bits)
        significand = fraction + (1 << self.mantissa_bits if field else 0)
        return math.ldexp(significand, max(field, 1) - self.bias - self.mantissa_bits)


def _usual_bias(exponent_bits: int, specials: Specials) -> int:
    return (1 << (exponent_bits - 1)) - (0 if specials == "fnuz" else 1)


def float_format(
    exponent_bits: int,
    mantissa_bits: int,
    specials: Specials | None = None,
    bias: int | None = None,
) -> ElementFormat:
    """Make a float element of 2 to 8 bits; kind and bias default to those of the OCP formats.

    Raises MicroscaleError for a width, kind or bias that no such format has.
    """
    element = _usual_float(exponent_bits, mantissa_bits)
    where = f"element format e{exponent_bits}m{mantissa_bits}"
    if exponent_bits < 1 or mantissa_bits < 0 or not 2 <= element.bits <= 8:
        raise MicroscaleError(
            f"{where} has {element.bits} bits; floats of 2 to 8 bits are supported."
        )
    specials = specials or element.specials
    if specials not in FLOAT_SPECIALS:
        raise MicroscaleError(
            f"{where}: kind {specials!r} is not known.{near_names(specials, FLOAT_SPECIALS)}"
        )
    if specials == "ieee" and mantissa_bits == 0:
        raise MicroscaleError(
            f"{where} of kind ieee has no mantissa bit to tell NaN from infinity."
        )
    if specials in ("ieee", "fn") and element.code_bits - mantissa_bits * (specials == "ieee") < 2:
        raise MicroscaleError(f"{where} of kind {specials} has no codes left for normal values.")
    bias = _usual_bias(exponent_bits, specials) if bias is None else bias
    if not 0 <= bias <= 64:
        raise MicroscaleError(f"{where} has bias {bias}; biases from 0 to 64 are supported.")
    return ElementFormat(exponent_bits, mantissa_bits, specials, bias)


def _usual_float(exponent_bits: int, mantissa_bits: int) -> ElementFormat:
    kinds: dict[tuple[int, int], Specials] = {(4, 3): "fn", (5, 2): "ieee"}
    specials = kinds.get((exponent_bits, mantissa_bits), "finite")
    bias = _usual_bias(max(exponent_bits, 1), specials)
    return ElementFormat(exponent_bits, mantissa_bits, specials, bias)


def integer_format(bits: int, specials: Specials = "finite") -> ElementFormat:
    """Make the integer element of `bits` bits, 2 to 8, with value k / 2^(bits-2).

    Raises MicroscaleError for a width or kind that no such format has.
    """
    if not 2 <= bits <= 8:
        raise MicroscaleError(f"element format int{bits}: integers of 2 to 8 bits are supported.")
    if specials not in INTEGER_SPECIALS:
        raise MicroscaleError(
            f"element format int{bits}: kind {specials!r} is not one of "
            f"{', '.join(INTEGER_SPECIALS)}."
        )
    return ElementFormat(0, bits - 2, specials, 0)


E4M3 = float_format(4, 3)
E5M2 = float_format(5, 2)
E2M3 = float_format(2, 3)
E3M2 = float_format(3, 2)
E2M1 = float_format(2, 1)
INT8 = integer_format(8)
INT4 = integer_format(4)

ELEMENTS: dict[str, ElementFormat] = {
    str(element): element for element in (E4M3, E5M2, E2M3, E3M2, E2M1, INT8, INT4)
}


@dataclass(frozen=True)
class ScaleFormat:
    """The grid of a shared scale.

    A power of two has `exponents`, the closed range of its exponents; a real-valued scale has a
    `grid`, whose positive values it takes. `bits` is what one scale costs as the format defines it;
    in storage it takes whole bytes, `stored_bits`. A scale that was settled beforehand has a
    `value`, and the code that stands for `zero` where integers have one.
    """

    name: str
    bits: int
    exponents: tuple[int, int] | None = None
    grid: ElementFormat | None = None
    value: float | None = None
    zero: int | None = None

    def __str__(self) -> str:
        """Return the spelling."""
        return self.name

    @property
    def is_power_of_two(self) -> bool:
        """Whether scales are powers of two, so that scaling is exact."""
        return self.exponents is not None

    @property
    def stored_bits(self) -> int:
        """Bits that one scale takes in memory: 8, 16 or 32."""
        return max(8, self.bits)

    @property
    def is_biased(self) -> bool:
        """Whether a power of two is stored as a biased code; else as its exponent, in int16."""
        return self.exponents is not None and self.bits <= 8

    @property
    def nan_code(self) -> int:
        """Code of NaN among biased powers of two: all ones."""
        return (1 << self.bits) - 1

    @property
    def largest(self) -> float:
        """Largest finite scale."""
        if self.grid is not None:
            return self.grid.largest
        assert self.exponents is not None
        return math.ldexp(1.0, self.exponents[1])

    @property
    def smallest(self) -> float:
        """Smallest positive scale."""
        if self.grid is not None:
            return self.grid.smallest
        assert self.exponents is not None
        return math.ldexp(1.0, self.exponents[0])

    @property
    def default_rule(self) -> ScaleRule:
        """The rule meant when a spelling names none."""
        return ScaleRule.FLOOR if self.is_power_of_two else ScaleRule.AMAX


def exponent_scale(bits: int) -> ScaleFormat:
    """Make the power-of-two scale of `bits` exponent bits, 2 to 8, the all-ones code being NaN."""
    if not 2 <= bits <= 8:
        raise MicroscaleError(f"scale format e{bits}m0: exponents of 2 to 8 bits are supported.")
    bias = (1 << (bits - 1)) - 1
    return ScaleFormat(f"e{bits}m0", bits, exponents=(-bias, (1 << bits) - 2 - bias))


E8M0 = exponent_scale(8)
UNIT = ScaleFormat("unit", 16, exponents=(0, 0))
"""No scale at all: 1. It is stored, since the NaN of a block has to be."""
POW2 = ScaleFormat("pow2", 16, exponents=(-1022, 1022))
SCALE_E4M3 = ScaleFormat("e4m3", 8, grid=E4M3)
UE5M3 = ScaleFormat("ue5m3", 8, grid=ElementFormat(5, 3, "ieee", 15))
BF16 = ScaleFormat("bf16", 16, grid=ElementFormat(8, 7, "ieee", 127))
FP32 = ScaleFormat("fp32", 32, grid=ElementFormat(8, 23, "ieee", 127))


def settled_scale(value: float, zero: int | None = None) -> ScaleFormat:
    """Make the scale that is `value` whatever the data is, as calibration settles it.

    `value` is rounded to float32. `zero` is the code that stands for zero, counted from the lowest,
    for integers with a zero point. Raises MicroscaleError for what is no positive finite float32.
    """
    value = _to_float32(value)
    if not 0 < value < math.inf:
        raise MicroscaleError(f"scale {value!r} is not a positive finite float32.")
    name = f"at{_shortest(value)}" + ("" if zero is None else f"z{zero}")
    return ScaleFormat(name, 32, grid=FP32.grid, value=value, zero=zero)


def _to_float32(value: float) -> float:
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
    return rounded


def _shortest(value: float) -> str:
    """The shortest decimal that float32 reads back, without an exponent."""
    digits = next(n for n in range(1, 10) if _to_float32(float(f"{value:.{n}g}")) == value)
    return f"{Decimal(f'{value:.{digits}g}'):f}"


SCALES: dict[str, ScaleFormat] = {
    str(scale): scale
    for scale in (*map(exponent_scale, range(8, 1, -1)), SCALE_E4M3, UE5M3, BF16, FP32, POW2, UNIT)
}


CONCRETE: dict[str, tuple[ElementFormat, ScaleFormat, int, ScaleFormat | None]] = {
    "mxfp8_e4m3": (E4M3, E8M0, 32, None),
    "mxfp8_e5m2": (E5M2, E8M0, 32, None),
    "mxfp6_e2m3": (E2M3, E8M0, 32, None),
    "mxfp6_e3m2": (E3M2, E8M0, 32, None),
    "mxfp4": (E2M1, E8M0, 32, None),
    "mxint8": (INT8, E8M0, 32, None),
    "nvfp4": (E2M1, SCALE_E4M3, 16, FP32),
}
"""The concrete formats: element, scale, block and tensor scale by name."""

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


def channel_dimension(dimensions: int, axis: int) -> int:
    """The dimension that a `channel` block keeps apart: 0, or the last if 0 is reduced."""
    return 0 if axis != 0 else dimensions - 1


def row_dimension(dimensions: int, axis: int) -> int | None:
    """The dimension that the rows of a tile run along; a vector has none.

    Of the matrices of a tensor (its last two dimensions) it is the one that is not the axis. A
    kernel [out, in, height, width], whose matrices lie in front, is cast along another axis: there
    it is the dimension before the axis, or the one behind it if the axis is the first.
    """
    if dimensions < 2:
        return None
    if axis >= dimensions - 2:
        return 2 * dimensions - 3 - axis
    return axis - 1 if axis else 1


def packing_group(bits: int) -> int:
    """The fewest codes of `bits` bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def packed_bytes(length: int, bits: int, padding: int) -> int:
    """Bytes of a row of `length` codes, padded to whole blocks and then to whole bytes."""
    whole = -(-length // padding) * padding
    group = packing_group(bits)
    return -(-whole // group) * group * bits // 8


def make_concrete(name: str) -> BlockFormat:
    """The concrete format of that name."""
    element, scale, block, tensor_scale = CONCRETE[name]
    return BlockFormat(element, scale, block, scale.default_rule, tensor_scale)


MXFP8_E4M3 = make_concrete("mxfp8_e4m3")
MXFP8_E5M2 = make_concrete("mxfp8_e5m2")
MXFP6_E2M3 = make_concrete("mxfp6_e2m3")
MXFP6_E3M2 = make_concrete("mxfp6_e3m2")
MXFP4 = make_concrete("mxfp4")
MXINT8 = make_concrete("mxint8")
NVFP4 = make_concrete("nvfp4")

NAMED: dict[str, BlockFormat] = {name: make_concrete(name) for name in CONCRETE} | {
    str(fmt): fmt
    for fmt in (
        BlockFormat(element, FP32, block)
        for element in (INT8, INT4, E4M3, E5M2)
        for block in WHOLE_BLOCKS
    )
}
"""The formats that tables list, by their spelling. Any other can be written down."""
