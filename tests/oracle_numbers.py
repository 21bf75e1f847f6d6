"""Exact numbers for the oracle: float types, element grids, rounding on them.

Pure `fractions.Fraction`; nothing of `microscale`, torch or numpy.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

INF = math.inf
NAN = math.nan


def power(exponent: int) -> Fraction:
    """Two to an integer power, exactly."""
    return Fraction(2) ** exponent


def floor_log2(value: Fraction) -> int:
    """The largest integer e with 2**e <= value, for value > 0."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    while power(guess) > value:
        guess -= 1
    while power(guess + 1) <= value:
        guess += 1
    return guess


def ceil_log2(value: Fraction) -> int:
    """The smallest integer e with value <= 2**e, for value > 0."""
    floor = floor_log2(value)
    return floor if power(floor) == value else floor + 1


def half_even(value: Fraction) -> int:
    """The nearest integer of a value >= 0, ties to even."""
    whole = math.floor(value)
    rest = value - whole
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    return whole + up


@dataclass(frozen=True)
class Binary:
    """An IEEE-like binary type: significand bits (hidden one included), exponents, largest."""

    precision: int
    emin: int
    largest: Fraction

    def round(self, value: Fraction) -> Fraction | None:
        """Round a value >= 0 to nearest even; None where it is beyond the largest."""
        if value == 0:
            return value
        quantum = power(max(floor_log2(value), self.emin) - self.precision + 1)
        rounded = half_even(value / quantum) * quantum
        return rounded if rounded <= self.largest else None


def ieee(precision: int, emax: int) -> Binary:
    """The IEEE 754 type of that precision and largest exponent."""
    return Binary(precision, 1 - emax, power(emax) * (2 - power(1 - precision)))


DTYPES = {
    "float16": ieee(11, 15),
    "bfloat16": ieee(8, 127),
    "float32": ieee(24, 127),
    "float64": ieee(53, 1023),
}


def to_float(value: Fraction | None, negative: bool) -> float:
    """A magnitude (None: infinite) and a sign as a Python float."""
    magnitude = INF if value is None else float(value)
    return -magnitude if negative else magnitude


def is_negative(value: float) -> bool:
    """Whether the sign bit is set (also of -0.0)."""
    return math.copysign(1.0, value) < 0


def round_to(value: float, dtype: str) -> float:
    """One IEEE rounding of a Python float to a float type."""
    if math.isnan(value) or math.isinf(value):
        return value
    return to_float(DTYPES[dtype].round(abs(Fraction(value))), is_negative(value))


@dataclass(frozen=True)
class Element:
    """An element format by its bit fields; `integer` is the number of bits of an INTn, else 0."""

    exponent_bits: int = 0
    mantissa_bits: int = 0
    specials: str = "finite"
    bias: int = 0
    integer: int = 0

    @property
    def bits(self) -> int:
        return self.integer or 1 + self.exponent_bits + self.mantissa_bits

    @property
    def width(self) -> int:
        """Mantissa bits after the leading one, as the rule `even` understands them."""
        return self.integer - 2 if self.integer else self.mantissa_bits

    def decode(self, code: int) -> float:
        """The value of a code (OCP MX 1.0 section 5.3; OFP8; the fnuz types of 2309.17224)."""
        sign = code >> (self.bits - 1)
        if self.integer:
            return math.ldexp(code - (sign << self.bits), 2 - self.integer)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        if self._is_nan(code, exponent, mantissa):
            return NAN
        if self.specials == "ieee" and exponent == (1 << self.exponent_bits) - 1:
            return -INF if sign else INF
        significand = mantissa + ((1 << self.mantissa_bits) if exponent else 0)
        value = significand * power(max(exponent, 1) - self.bias - self.mantissa_bits)
        return to_float(value, bool(sign))

    def _is_nan(self, code: int, exponent: int, mantissa: int) -> bool:
        top = exponent == (1 << self.exponent_bits) - 1
        if self.specials == "fn":
            return top and mantissa == (1 << self.mantissa_bits) - 1
        if self.specials == "fnuz":
            return code == 1 << (self.bits - 1)
        return self.specials == "ieee" and top and mantissa != 0

    @cached_property
    def values(self) -> tuple[float, ...]:
        return tuple(self.decode(code) for code in range(2**self.bits))

    @cached_property
    def magnitudes(self) -> tuple[Fraction, ...]:
        """Finite magnitudes in rising order; a magnitude's place is its code without the sign."""
        positive = self.values[: 2 ** (self.bits - 1)]
        return tuple(Fraction(value) for value in positive if math.isfinite(value))

    @cached_property
    def largest(self) -> Fraction:
        return self.magnitudes[-1]

    @cached_property
    def emax(self) -> int:
        return floor_log2(self.largest)

    @cached_property
    def beyond(self) -> Fraction:
        """The value that would follow the largest, were there no end."""
        emin = 0 if self.integer else 1 - self.bias
        return self.largest + power(max(self.emax, emin) - self.width)

    @cached_property
    def grid(self) -> tuple[Fraction, ...]:
        return (*self.magnitudes, self.beyond)

    @property
    def has_negative_zero(self) -> bool:
        return not self.integer and self.specials != "fnuz"

    @cached_property
    def has_nan(self) -> bool:
        return any(math.isnan(value) for value in self.values)

    @cached_property
    def has_inf(self) -> bool:
        return INF in self.values

    def code_of(self, value: float) -> int:
        """The code of a value on the grid (the first one, for NaN)."""
        return self._codes[value.hex()]

    @cached_property
    def _codes(self) -> dict[str, int]:
        # float.hex tells -0.0 from 0.0 and spells every NaN alike.
        pairs = enumerate(self.values)
        return {value.hex(): code for code, value in reversed(list(pairs))}


def float_element(
    exponent_bits: int, mantissa_bits: int, specials: str = "finite", bias: int | None = None
) -> Element:
    """An ExMy; the bias is 2**(e-1) - 1, and 2**(e-1) for fnuz, unless told otherwise."""
    if bias is None:
        bias = 2 ** (exponent_bits - 1) - (specials != "fnuz")
    return Element(exponent_bits, mantissa_bits, specials, bias)


def int_element(bits: int, specials: str = "finite") -> Element:
    """An INTn: two's complement k / 2**(n-2); `full` ones produce the most negative code too."""
    return Element(integer=bits, specials=specials)


def tie_goes_up(element: Element, low: int, rounding: str) -> bool:
    """Whether a tie between the magnitudes `low` and `low + 1` goes to the larger one.

    Without mantissa bits no nonzero significand is even; IEEE 754-2019 4.3.1 then delivers the
    larger magnitude.
    """
    if rounding == "away" or low % 2 == 1:
        return True
    return low > 0 and not element.integer and element.mantissa_bits == 0


def round_magnitude(element: Element, value: Fraction, rounding: str) -> Fraction | None:
    """Round a magnitude once on the element's grid; None where the result is beyond the largest."""
    grid = element.grid
    low = bisect_right(grid, value) - 1
    if low == len(grid) - 1:
        return None
    middle = (grid[low] + grid[low + 1]) / 2
    up = value > middle or (value == middle and tie_goes_up(element, low, rounding))
    if rounding == "zero":
        up = False
    place = low + up
    return None if place == len(grid) - 1 else grid[place]
