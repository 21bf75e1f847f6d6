"""Formats in words, and as plain data: what the command line, the documentation and JSON share."""

import math
from collections.abc import Iterator
from dataclasses import replace

from microscale.formats import BlockFormat, ElementFormat, ScaleFormat
from microscale.rounding import LAWS

EXAMPLE = (4096, 4096)


def number(value: float) -> str:
    """A value of a format, short and exact where that is possible: `1.75`, `2^-9`, `3 x 2^-16`."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    mantissa, exponent = math.frexp(abs(value))
    trailing = next(bit for bit in range(53) if (math.ldexp(mantissa, bit)).is_integer())
    odd, power = int(math.ldexp(mantissa, trailing)), exponent - trailing
    sign = "-" if value < 0 else ""
    if float(f"{value:g}") == value and len(f"{abs(value):g}") <= 6:
        return f"{value:g}"
    if odd == 1:
        return f"{sign}2^{power}"
    if len(exact := f"{value!r}") <= 9:
        return exact
    return f"{sign}{odd} x 2^{power}" if odd < 1000 else f"{value:.6g}"


def describe(fmt: BlockFormat | ElementFormat) -> str:
    """One line in words: `e2m1 elements, one e8m0 scale for each 32 values, 4.25 bits a value`."""
    if isinstance(fmt, ElementFormat):
        return f"{fmt.bits}-bit {'integer' if fmt.is_integer else 'float'} element"
    outer = f", one {fmt.tensor_scale} scale for the tensor" if fmt.tensor_scale else ""
    bits = f"{fmt.bits_per_value:g} bits a value"
    zero = " and one zero point" if fmt.zero_point else ""
    return f"{fmt.element} elements, one {fmt.scale} scale{zero} {block_words(fmt)}{outer}, {bits}"


def block_words(fmt: BlockFormat) -> str:
    """The block of a format in words."""
    words = {
        "channel": "for each output channel",
        "token": "for the whole length of the axis",
        "tensor": "for the tensor",
    }
    if isinstance(fmt.block, str):
        return words[fmt.block]
    if isinstance(fmt.block, int):
        return f"for each {fmt.block} values"
    return f"for each tile of {fmt.block[0]} x {fmt.block[1]}"


def properties(fmt: BlockFormat | ElementFormat) -> Iterator[tuple[str, str]]:
    """Name and value of every property, scale and block before the element."""
    if isinstance(fmt, BlockFormat):
        megabytes = fmt.storage_bits(EXAMPLE) / 8e6
        rows, columns = EXAMPLE
        yield "block", f"one scale {block_words(fmt)}"
        yield "bits per value", f"{fmt.bits_per_value:g}"
        yield "storage", f"a {rows} x {columns} weight takes {megabytes:.2f} MB, scales included"
        yield "scale", f"{fmt.scale}, {fmt.scale.bits} bits, {scale_range(fmt.scale)}"
        if fmt.tensor_scale is not None:
            yield "tensor scale", f"{fmt.tensor_scale}, amax of the tensor / (largest x largest)"
        assert fmt.rule is not None
        yield "scale rule", f"{fmt.rule}: {fmt.rule.law}"
        if fmt.zero_point:
            yield "zero point", "int8, the code that stands for zero; all codes are used"
        yield from _element_properties(fmt.element, whole_range=fmt.zero_point)
    else:
        yield from _element_properties(fmt)
    for option in LAWS:
        default = next(iter(option))
        yield option.argument(), f"{default} unless told otherwise: {default.law}"


def _element_properties(
    element: ElementFormat, *, whole_range: bool = False
) -> Iterator[tuple[str, str]]:
    layout = element_layout(replace(element, specials="full") if whole_range else element)
    yield "element", f"{element}, {element.bits} bits: {layout}"
    yield "emin, emax", f"{element.emin}, {element.emax}"
    yield "largest", number(element.largest)
    if element.smallest_normal is not None:
        yield "smallest normal", number(element.smallest_normal)
    if element.smallest_subnormal is not None:
        yield "smallest subnormal", number(element.smallest_subnormal)
    elif element.is_integer:
        yield "step", number(element.smallest)
    yield "negative zero", "yes" if element.has_negative_zero else "no"
    yield "NaN, infinity", specials_words(element)


def element_layout(element: ElementFormat) -> str:
    """The fields of a code in words."""
    if element.is_integer:
        value = f"two's complement k, value k / 2^{element.mantissa_bits}"
        full = element.specials == "full"
        return value if full else f"{value}; the most negative k is never produced"
    bias = f"bias {element.bias}"
    return f"sign, {element.exponent_bits} exponent, {element.mantissa_bits} mantissa, {bias}"


def specials_words(element: ElementFormat) -> str:
    """The codes that are not numbers."""
    nan = f"NaN 0x{element.nan_code:02x}" if element.nan_code is not None else "no NaN"
    inf = f"infinity 0x{element.inf_code:02x}" if element.inf_code is not None else "no infinity"
    return f"{nan}, {inf}"


def scale_range(scale: ScaleFormat) -> str:
    """The positive scales that can be stored."""
    kind = "powers of two" if scale.is_power_of_two else "real values"
    return f"{kind} from {number(scale.smallest)} to {number(scale.largest)}"


def record(fmt: BlockFormat | ElementFormat) -> dict[str, object]:
    """A format as JSON data. NaN and infinities are the strings `nan`, `inf`, `-inf`."""
    if isinstance(fmt, ElementFormat):
        return element_record(fmt)
    assert fmt.rule is not None
    return {
        "name": str(fmt),
        "description": describe(fmt),
        "bits_per_value": fmt.bits_per_value,
        "block": fmt.block,
        "rule": {"name": str(fmt.rule), "law": fmt.rule.law},
        "scale": _scale_record(fmt.scale),
        "tensor_scale": _scale_record(fmt.tensor_scale) if fmt.tensor_scale else None,
        "zero_point": fmt.zero_point,
        "element": element_record(fmt.element),
    }


def _scale_record(scale: ScaleFormat) -> dict[str, object]:
    return {
        "name": str(scale),
        "bits": scale.bits,
        "is_power_of_two": scale.is_power_of_two,
        "smallest": scale.smallest,
        "largest": scale.largest,
    }


def element_record(element: ElementFormat) -> dict[str, object]:
    """An element format as JSON data, with the value of every code in order."""
    return {
        "name": str(element),
        "bits": element.bits,
        "exponent_bits": element.exponent_bits,
        "mantissa_bits": element.mantissa_bits,
        "specials": element.specials,
        "bias": element.bias,
        "emin": element.emin,
        "emax": element.emax,
        "largest": element.largest,
        "smallest_normal": element.smallest_normal,
        "smallest_subnormal": element.smallest_subnormal,
        "nan_code": element.nan_code,
        "inf_code": element.inf_code,
        "has_negative_zero": element.has_negative_zero,
        "values": [_json_number(value) for value in element.values],
    }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
