"""The numerics contract in exact rational arithmetic, written to be read and not to be fast.

Everything here is `fractions.Fraction` and plain Python: no torch, no numpy, nothing of
`microscale`. Element grids come from the bit fields of every code, rounding is a search among
neighbours, and float32 or float64 arithmetic is emulated by rounding exact quotients and products
once, to nearest even. Values that leave this module are Python floats: every value of every input
and output type is exactly one, and they carry NaN, Inf and the sign of zero.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

INF = math.inf
NAN = math.nan
FLOAT32_MIN_NORMAL = Fraction(1, 2**126)


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


def int_element(bits: int) -> Element:
    """An INTn: two's complement k / 2**(n-2)."""
    return Element(integer=bits)


@dataclass(frozen=True)
class Scale:
    """A scale format: powers of two between two exponents, or real values of a binary type."""

    name: str
    exponents: tuple[int, int] | None = None
    binary: Binary | None = None

    @property
    def code_zero(self) -> int:
        """The exponent of code 0, the scale of an all-zero block: E8M0 is biased, POW2 is not."""
        assert self.exponents is not None
        return self.exponents[0] if self.name == "e8m0" else 0

    def round(self, value: Fraction) -> Fraction:
        """Nearest even, saturating at the largest finite value."""
        assert self.binary is not None
        rounded = self.binary.round(value)
        return self.binary.largest if rounded is None else rounded


E8M0 = Scale("e8m0", exponents=(-127, 127))
POW2 = Scale("pow2", exponents=(-1022, 1022))
E4M3 = Scale("e4m3", binary=Binary(4, -6, Fraction(448)))
UE5M3 = Scale("ue5m3", binary=Binary(4, -14, Fraction(61440)))  # as in arXiv 2609.02846
BF16 = Scale("bf16", binary=DTYPES["bfloat16"])
FP32 = Scale("fp32", binary=DTYPES["float32"])


@dataclass(frozen=True)
class Format:
    """What one block needs: its element, its scale, the rule that finds the scale."""

    element: Element
    scale: Scale
    rule: str
    block: int | str = 32
    two_level: bool = False


@dataclass(frozen=True)
class Options:
    """The keyword arguments of the verbs."""

    rounding: str = "even"
    overflow: str = "saturate"
    nonfinite: str = "block"
    flush: str = "off"


@dataclass(frozen=True)
class Block:
    """One cast block: the scale (NaN for a poisoned block), codes and decoded values."""

    scale: float
    codes: tuple[int, ...]
    values: tuple[float, ...]


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


def encode(element: Element, value: Fraction, negative: bool, options: Options) -> float:
    """The element value of an exact quotient: one rounding, then overflow."""
    rounded = round_magnitude(element, value, options.rounding)
    if rounded is None:
        if options.overflow == "nonfinite":
            return to_float(None, negative) if element.has_inf else NAN
        rounded = element.largest
    if rounded == 0 and not element.has_negative_zero:
        negative = False
    return to_float(rounded, negative)


def shared_exponent(amax: Fraction, element: Element, rule: str) -> int:
    """The exponent of a power-of-two scale before it is clamped (contract, point 3)."""
    if rule == "floor":
        return floor_log2(amax) - element.emax
    if rule == "ceil":
        return ceil_log2(amax) - element.emax
    if rule == "rceil":
        return ceil_log2(amax / element.largest)
    assert rule == "even"
    quantum = power(floor_log2(amax) - element.width)
    return floor_log2(half_even(amax / quantum) * quantum) - element.emax


def _amax(values: Sequence[float]) -> Fraction:
    return max((abs(Fraction(v)) for v in values if math.isfinite(v)), default=Fraction(0))


def _flushed(values: Sequence[float], mode: str) -> tuple[float, ...]:
    """Float32 subnormals as signed zeros: each one, or all of a block that has nothing larger."""
    tiny = _amax(values) < FLOAT32_MIN_NORMAL
    if mode == "off" or (mode == "block" and not tiny):
        return tuple(values)
    return tuple(math.copysign(0.0, v) if abs(v) < FLOAT32_MIN_NORMAL else v for v in values)


def _is_poisoned(values: Sequence[float], element: Element, options: Options) -> bool:
    nan = any(math.isnan(v) for v in values)
    if options.nonfinite == "block":
        return nan or any(math.isinf(v) for v in values)
    return nan and not element.has_nan


def _element(value: float, quotient: Fraction | None, element: Element, options: Options) -> float:
    """One element of a healthy block; the quotient is None where dividing overflowed."""
    if math.isnan(value):
        return NAN
    if math.isinf(value) and element.has_inf:
        return value
    if math.isinf(value) or quotient is None:
        quotient = element.beyond * 2
    return encode(element, quotient, is_negative(value), options)


def cast_block(
    values: Sequence[float], fmt: Format, options: Options, *, compute: str, out: str
) -> Block:
    """Cast one block (contract, points 2 to 7) whose scale depends on nothing else.

    `compute` is float64 for float64 inputs and float32 for all others; `out` the output type.
    """
    values = _flushed(values, options.flush)
    if _is_poisoned(values, fmt.element, options):
        return _nan_block(values)
    if fmt.scale.exponents is None:
        return _cast_real(values, fmt, options, compute=compute, out=out)
    low, high = fmt.scale.exponents
    amax = _amax(values)
    exponent = shared_exponent(amax, fmt.element, fmt.rule) if amax else fmt.scale.code_zero
    scale = power(min(max(exponent, low), high))
    coded = [_element(v, _over(v, scale), fmt.element, options) for v in values]
    return _block(coded, fmt.element, float(scale), [_exact_times(c, scale, out) for c in coded])


def _over(value: float, scale: Fraction) -> Fraction | None:
    return abs(Fraction(value)) / scale if math.isfinite(value) else None


def _exact_times(coded: float, scale: Fraction, out: str) -> float:
    if not math.isfinite(coded):
        return coded
    return to_float(DTYPES[out].round(abs(Fraction(coded)) * scale), is_negative(coded))


def _block(
    coded: Sequence[float], element: Element, scale: float, decoded: Sequence[float]
) -> Block:
    return Block(scale, tuple(element.code_of(c) for c in coded), tuple(decoded))


def _real_scale(amax: Fraction, fmt: Format) -> Fraction:
    """amax / largest in float64, then rounded to the scale format; 1 for zeros.

    For inputs narrower than float64 the detour through float64 changes no bit.
    """
    if amax == 0:
        return Fraction(1)
    quotient = DTYPES["float64"].round(amax / fmt.element.largest)
    assert quotient is not None
    return fmt.scale.round(quotient)


def _vanishes(values: Sequence[float], scale: Fraction) -> bool:
    """Whether an infinity stands beside a scale that underflowed to 0: then the block is NaN."""
    return scale == 0 and any(math.isinf(v) for v in values)


def _nan_block(values: Sequence[float]) -> Block:
    return Block(NAN, (), (NAN,) * len(values))


def _quotient(value: float, scale: Fraction, compute: str) -> Fraction | None:
    """The quotient in the computing type; a scale that underflowed to 0 makes zeros."""
    if not math.isfinite(value):
        return None
    return DTYPES[compute].round(abs(Fraction(value)) / scale) if scale else Fraction(0)


def _times(left: float, right: Fraction, compute: str) -> float:
    """A product in the computing type."""
    if not math.isfinite(left):
        return left
    return to_float(DTYPES[compute].round(abs(Fraction(left)) * right), is_negative(left))


def _cast_real(
    values: Sequence[float], fmt: Format, options: Options, *, compute: str, out: str
) -> Block:
    scale = _real_scale(_amax(values), fmt)
    if _vanishes(values, scale):
        return _nan_block(values)
    coded = [_element(v, _quotient(v, scale, compute), fmt.element, options) for v in values]
    decoded = [round_to(_times(c, scale, compute), out) for c in coded]
    return _block(coded, fmt.element, float(scale), decoded)


@dataclass(frozen=True)
class TwoLevel:
    """A tensor of blocks under one float32 tensor scale (NVFP4)."""

    tensor_scale: float
    blocks: tuple[Block, ...]


def cast_two_level(
    blocks: Sequence[Sequence[float]], fmt: Format, options: Options, *, compute: str, out: str
) -> TwoLevel:
    """Cast all blocks of a tensor under a tensor scale (contract, point 2: NVFP4).

    The tensor scale looks at the blocks that are not poisoned, at finite values only.
    """
    flushed = [_flushed(block, options.flush) for block in blocks]
    healthy = [b for b in flushed if not _is_poisoned(b, fmt.element, options)]
    amax = max((_amax(block) for block in healthy), default=Fraction(0))
    assert fmt.scale.binary is not None
    largest = fmt.scale.binary.largest * fmt.element.largest
    quotient = DTYPES["float64"].round(amax / largest) if amax else Fraction(1)
    assert quotient is not None
    tensor_scale = DTYPES["float32"].round(quotient)
    assert tensor_scale is not None
    cast = [_cast_level(b, tensor_scale, fmt, options, compute=compute, out=out) for b in flushed]
    return TwoLevel(float(tensor_scale), tuple(cast))


def _cast_level(
    values: Sequence[float],
    tensor_scale: Fraction,
    fmt: Format,
    options: Options,
    *,
    compute: str,
    out: str,
) -> Block:
    if _is_poisoned(values, fmt.element, options):
        return _nan_block(values)
    scale = _level_scale(_amax(values), tensor_scale, fmt, compute)
    if _vanishes(values, scale):
        return _nan_block(values)
    product = DTYPES[compute].round(scale * tensor_scale)
    assert product is not None
    coded = [_element(v, _quotient(v, product, compute), fmt.element, options) for v in values]
    inner = [_times(c, scale, compute) for c in coded]
    decoded = [round_to(_times(v, tensor_scale, compute), out) for v in inner]
    return _block(coded, fmt.element, float(scale), decoded)


def _level_scale(amax: Fraction, tensor_scale: Fraction, fmt: Format, compute: str) -> Fraction:
    """E4M3((amax / 6) / tensor scale), each division rounded; 1 for zeros, 0 kept."""
    if amax == 0:
        return Fraction(1)
    if tensor_scale == 0:
        return Fraction(0)
    first = DTYPES[compute].round(amax / fmt.element.largest)
    assert first is not None
    second = DTYPES[compute].round(first / tensor_scale)
    return fmt.scale.round(DTYPES[compute].largest if second is None else second)


ELEMENTS = {
    "e4m3": float_element(4, 3, "fn"),
    "e5m2": float_element(5, 2, "ieee"),
    "e2m3": float_element(2, 3),
    "e3m2": float_element(3, 2),
    "e2m1": float_element(2, 1),
    "int8": int_element(8),
    "int4": int_element(4),
}

MX = {
    "mxfp8_e4m3": Format(ELEMENTS["e4m3"], E8M0, "floor"),
    "mxfp8_e5m2": Format(ELEMENTS["e5m2"], E8M0, "floor"),
    "mxfp6_e2m3": Format(ELEMENTS["e2m3"], E8M0, "floor"),
    "mxfp6_e3m2": Format(ELEMENTS["e3m2"], E8M0, "floor"),
    "mxfp4": Format(ELEMENTS["e2m1"], E8M0, "floor"),
    "mxint8": Format(ELEMENTS["int8"], E8M0, "floor"),
}

NVFP4 = Format(ELEMENTS["e2m1"], E4M3, "amax", block=16, two_level=True)


def real(element: str, block: int | str, scale: Scale = FP32) -> Format:
    """A format with one real-valued scale per block."""
    return Format(ELEMENTS[element], scale, "amax", block=block)


def _variety() -> dict[str, Format]:
    """Formats by spelling: all concrete and whole-block ones, and some of every other kind."""
    formats = dict(MX)
    formats |= {f"{name}-rceil": replace(fmt, rule="rceil") for name, fmt in MX.items()}
    formats["nvfp4"] = NVFP4
    for element in ("int8", "int4", "e4m3", "e5m2"):
        prefix = element if element.startswith("int") else f"fp8_{element}"
        for block in ("channel", "token", "tensor"):
            formats[f"{prefix}-{block}"] = real(element, block)
    formats["e2m1-16-ue5m3"] = real("e2m1", 16, UE5M3)
    formats["int8-token-bf16"] = real("int8", "token", BF16)
    formats["e2m3-5-e4m3"] = real("e2m3", 5, E4M3)
    formats["e3m2-tensor-e8m0-ceil"] = Format(ELEMENTS["e3m2"], E8M0, "ceil", "tensor")
    formats["e2m0-7-bf16"] = Format(float_element(2, 0), BF16, "amax", 7)
    formats["int3-8-even"] = Format(int_element(3), E8M0, "even", 8)
    formats["int5-3"] = Format(int_element(5), E8M0, "floor", 3)
    formats["e3m3-16-pow2-ceil"] = Format(float_element(3, 3), POW2, "ceil", 16)
    formats["e4m3fnuz-channel"] = Format(float_element(4, 3, "fnuz"), FP32, "amax", "channel")
    formats["e4m0-1"] = Format(float_element(4, 0), E8M0, "floor", 1)
    return formats


def with_rule(fmt: Format, rule: str) -> Format:
    """The same format under another scale rule."""
    return replace(fmt, rule=rule)


VARIETY = _variety()


def cast_blocks(
    blocks: Sequence[Sequence[float]], fmt: Format, options: Options, *, compute: str, out: str
) -> tuple[Block, ...]:
    """Cast all blocks of a tensor, under a tensor scale where the format has one."""
    if fmt.two_level:
        return cast_two_level(blocks, fmt, options, compute=compute, out=out).blocks
    return tuple(cast_block(b, fmt, options, compute=compute, out=out) for b in blocks)


def pack(codes: Sequence[int], bits: int) -> bytes:
    """Codes as one bit stream, least significant bit first, filled up to whole bytes with zeros."""
    stream = 0
    for place, code in enumerate(codes):
        stream |= code << (place * bits)
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")


def unpack(stream: bytes, bits: int, count: int) -> list[int]:
    """The first codes of a stream made by `pack`."""
    whole = int.from_bytes(stream, "little")
    return [(whole >> (place * bits)) & (2**bits - 1) for place in range(count)]


def pack_row(codes: Sequence[int], bits: int, block: int) -> bytes:
    """One row as it is stored: zero codes up to whole blocks, then to whole groups of bytes."""
    group = math.lcm(bits, 8) // bits
    filled = math.ceil(len(codes) / block) * block
    filled = math.ceil(filled / group) * group
    return pack([*codes, *[0] * (filled - len(codes))], bits)
