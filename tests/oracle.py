"""The numerics contract in exact rational arithmetic, written to be read and not to be fast.

Everything here is `fractions.Fraction` and plain Python: no torch, no numpy, nothing of
`microscale`. Element grids come from the bit fields of every code, rounding is a search among
neighbours, and float32 or float64 arithmetic is emulated by rounding exact quotients and products
once, to nearest even. Values that leave this module are Python floats: every value of every input
and output type is exactly one, and they carry NaN, Inf and the sign of zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from oracle_numbers import (
    DTYPES,
    NAN,
    Binary,
    Element,
    ceil_log2,
    float_element,
    floor_log2,
    half_even,
    int_element,
    is_negative,
    power,
    round_magnitude,
    round_to,
    to_float,
)

FLOAT32_MIN_NORMAL = Fraction(1, 2**126)


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
        return self.exponents[0] if self.name.endswith("m0") else 0

    def round(self, value: Fraction) -> Fraction:
        """Nearest even, saturating at the largest finite value."""
        assert self.binary is not None
        rounded = self.binary.round(value)
        return self.binary.largest if rounded is None else rounded


E8M0 = Scale("e8m0", exponents=(-127, 127))
E5M0 = Scale("e5m0", exponents=(-15, 15))
E2M0 = Scale("e2m0", exponents=(-1, 1))
UNIT = Scale("unit", exponents=(0, 0))
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
    block: int | str | tuple[int, int] = 32
    two_level: bool = False
    zero_point: bool = False


@dataclass(frozen=True)
class Options:
    """The keyword arguments of the verbs."""

    rounding: str = "even"
    overflow: str = "saturate"
    nonfinite: str = "block"
    flush: str = "off"
    prerounding: str = "off"


@dataclass(frozen=True)
class Block:
    """One cast block: the scale (NaN for a poisoned block), codes and decoded values."""

    scale: float
    codes: tuple[int, ...]
    values: tuple[float, ...]


def encode(element: Element, value: Fraction, negative: bool, options: Options) -> float:
    """The element value of an exact quotient: one rounding, then overflow."""
    rounded = round_magnitude(element, value, options.rounding)
    if rounded is None and negative and element.specials == "full":
        rounded = element.beyond  # the most negative code
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
    if rule == "seven_quarters":
        top = floor_log2(amax)
        return top + (amax >= Fraction(7, 4) * power(top)) - element.emax
    assert rule == "even"
    quantum = power(floor_log2(amax) - element.width)
    return floor_log2(half_even(amax / quantum) * quantum) - element.emax


def _amax(values: Sequence[float]) -> Fraction:
    return max((abs(Fraction(v)) for v in values if math.isfinite(v)), default=Fraction(0))


def _prerounded(value: float, rounding: str) -> float:
    """A value on bfloat16's grid, which has no end of its own: what lies beyond is infinite."""
    if not math.isfinite(value) or value == 0:
        return value
    magnitude, largest = abs(Fraction(value)), DTYPES["bfloat16"].largest
    quantum = power(max(floor_log2(magnitude), -126) - 7)
    steps = magnitude / quantum
    nearest = {"away": math.floor(steps + Fraction(1, 2)), "zero": math.floor(steps)}
    rounded = nearest.get(rounding, half_even(steps)) * quantum
    return to_float(rounded if rounded <= largest else None, is_negative(value))


def _prepared(values: Sequence[float], options: Options) -> tuple[float, ...]:
    """Prerounded, and float32 subnormals as signed zeros: each, or all of a block without more."""
    if options.prerounding != "off":
        values = [_prerounded(value, options.rounding) for value in values]
    mode = options.flush
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
    values = _prepared(values, options)
    if _is_poisoned(values, fmt.element, options):
        return _nan_block(values)
    if fmt.zero_point:
        return _cast_zero_point(values, fmt, options, compute=compute, out=out)
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


def _cast_zero_point(
    values: Sequence[float], fmt: Format, options: Options, *, compute: str, out: str
) -> Block:
    """Integers k of a whole range, of which the zero point z stands for 0: (k - z) x scale."""
    bits, step = fmt.element.integer, Fraction(1, 2 ** (fmt.element.integer - 2))
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero = _span(values, fmt, compute)
    if _vanishes(values, scale):
        return _nan_block(values)
    codes = []
    for value in values:
        if math.isinf(value):
            steps: int | None = None
        else:
            quotient = _quotient(value, scale, compute)
            steps = None if quotient is None else whole(quotient / step, options.rounding)
        if steps is None:
            codes.append(lowest if value < 0 else highest)
        else:
            steps = -steps if is_negative(value) else steps
            codes.append(min(max(steps + zero, lowest), highest))
    decoded = [_times(float((k - zero) * step), scale, compute) for k in codes]
    decoded = [round_to(value + 0.0, out) for value in decoded]
    return Block(float(scale), tuple(k % 2**bits for k in codes), tuple(decoded))


def whole(value: Fraction, rounding: str) -> int:
    """The integer that a magnitude is rounded to."""
    if rounding == "zero":
        return math.floor(value)
    return round(value) if rounding == "even" else math.floor(value + Fraction(1, 2))


def _span(values: Sequence[float], fmt: Format, compute: str) -> tuple[Fraction, int]:
    """The scale of least to greatest value, and the integer that stands for zero."""
    assert fmt.scale.binary is not None
    bits = fmt.element.integer
    finite = [Fraction(v) for v in values if math.isfinite(v)]
    least, greatest = min([Fraction(0), *finite]), max([Fraction(0), *finite])
    if least == greatest:
        return Fraction(1), 0
    difference = DTYPES["float64"].round(greatest - least)
    codes = Fraction(2**bits - 1, 2 ** (bits - 2))
    quotient = None if difference is None else DTYPES["float64"].round(difference / codes)
    scale = fmt.scale.binary.largest if quotient is None else fmt.scale.round(quotient)
    if scale == 0:
        return scale, 0
    below = DTYPES[compute].round(-least / scale)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if below is None:
        return scale, highest
    return scale, min(lowest + round(below * 2 ** (bits - 2)), highest)


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
    flushed = [_prepared(block, options) for block in blocks]
    healthy = [b for b in flushed if not _is_poisoned(b, fmt.element, options)]
    amax = max((_amax(block) for block in healthy), default=Fraction(0))
    assert fmt.scale.binary is not None
    largest = fmt.scale.binary.largest * fmt.element.largest
    quotient = DTYPES["float64"].round(amax / largest) if amax else Fraction(1)
    assert quotient is not None
    tensor_scale = FP32.round(quotient)
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


def real(element: str, block: int | str | tuple[int, int], scale: Scale = FP32) -> Format:
    """A format with one real-valued scale per block."""
    return Format(ELEMENTS[element], scale, "amax", block=block)


def spanned(bits: int, block: int | str | tuple[int, int], scale: Scale = FP32) -> Format:
    """Integers with a zero point for each block."""
    return Format(int_element(bits), scale, "amax", block, zero_point=True)


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
    formats["mxfp4-3x5"] = replace(MX["mxfp4"], block=(3, 5))
    formats["nvfp4-2x4"] = replace(NVFP4, block=(2, 4))
    formats["int8-4x3-bf16"] = real("int8", (4, 3), BF16)
    formats["e2m3-1x4-e5m0-rceil"] = Format(ELEMENTS["e2m3"], E5M0, "rceil", (1, 4))
    formats["e2m1-4-e2m0"] = Format(ELEMENTS["e2m1"], E2M0, "floor", 4)
    formats["e4m3-tensor-unit"] = Format(ELEMENTS["e4m3"], UNIT, "floor", "tensor")
    formats["e3m2b1-1-unit"] = Format(float_element(3, 2, bias=1), UNIT, "floor", 1)
    formats["int8full-6"] = Format(int_element(8, "full"), E8M0, "floor", 6)
    formats["int4full-channel"] = Format(int_element(4, "full"), FP32, "amax", "channel")
    formats |= {
        "int8-channel-zero_point": spanned(8, "channel"),
        "int8-tensor-zero_point": spanned(8, "tensor"),
        "int4-5-zero_point": spanned(4, 5),
        "int3-token-bf16-zero_point": spanned(3, "token", BF16),
        "int2-4x2-e4m3-zero_point": spanned(2, (4, 2), E4M3),
    }
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
