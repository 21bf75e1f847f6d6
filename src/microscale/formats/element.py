"""Element formats: the grid of one value.

Sources: OCP Microscaling Formats (MX) v1.0; OCP OFP8 v1.0 for E4M3 and E5M2;
arXiv 2309.17224 for the `fnuz` kind.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from microscale.errors import MicroscaleError, near_names

Specials = Literal["finite", "fn", "fnuz", "ieee", "full"]
"""Which codes are not numbers: none; one NaN magnitude; the code of -0; the top exponent.

Integers are `finite`, or `full` if they use the most negative code too."""

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
