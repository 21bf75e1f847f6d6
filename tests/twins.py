"""Every element format beside its twin of the oracle."""

from functools import cache

from microscale.formats import FLOAT_SPECIALS, ElementFormat, Specials, float_format, integer_format
from oracle_numbers import Element, float_element, int_element

Twins = tuple[ElementFormat, Element]


def usable(exponent_bits: int, mantissa_bits: int, specials: Specials) -> bool:
    """Whether that kind leaves a normal value, and tells NaN from infinity."""
    if specials == "ieee":
        return exponent_bits >= 2 and mantissa_bits >= 1
    return specials != "fn" or exponent_bits + mantissa_bits >= 2


def twins(
    exponent_bits: int, mantissa_bits: int, specials: Specials, bias: int | None = None
) -> Twins:
    return (
        float_format(exponent_bits, mantissa_bits, specials, bias),
        float_element(exponent_bits, mantissa_bits, specials, bias),
    )


@cache
def every_element() -> dict[str, Twins]:
    """All floats of 2 to 8 bits, of each kind of specials, and all integers of 2 to 8 bits."""
    pairs = [
        twins(e, m, specials)
        for e in range(1, 8)
        for m in range(8 - e)
        for specials in FLOAT_SPECIALS
        if usable(e, m, specials)
    ]
    pairs += [(integer_format(n), int_element(n)) for n in range(2, 9)]
    pairs += [(integer_format(n, "full"), int_element(n, "full")) for n in range(2, 9)]
    return {str(element): (element, twin) for element, twin in pairs}
