"""Scale formats: the grid of a shared scale.

Sources: OCP Microscaling Formats (MX) v1.0 for E8M0; NVIDIA Transformer Engine
documentation for NVFP4's.
"""

import math
import struct
from dataclasses import dataclass
from decimal import Decimal

from microscale.errors import MicroscaleError
from microscale.formats.element import E4M3, ElementFormat
from microscale.rounding import ScaleRule


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
