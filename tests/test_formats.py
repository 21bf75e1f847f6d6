"""Every property of every format, derived again by brute force over its codes."""

import dataclasses
import math
from dataclasses import replace
from fractions import Fraction

import pytest

from microscale.errors import MicroscaleError
from microscale.formats import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    ELEMENTS,
    FP32,
    INT4,
    INT8,
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NAMED,
    NVFP4,
    POW2,
    SCALE_E4M3,
    SCALES,
    UE5M3,
    UNIT,
    BlockFormat,
    ElementFormat,
    ScaleFormat,
    Specials,
    exponent_scale,
    float_format,
    integer_format,
)
from microscale.rounding import ScaleRule
from microscale.spelling import get_block_format, get_format
from oracle_numbers import Element
from twins import every_element, twins

BIASED: list[tuple[int, int, Specials, int]] = [
    (4, 3, "fnuz", 11),
    (4, 3, "fn", 0),
    (2, 1, "finite", 3),
    (5, 2, "ieee", 16),
    (3, 0, "finite", 64),
]
EVERY_ELEMENT = [*every_element().values(), *(twins(*biased) for biased in BIASED)]
CODES = sum(2**element.bits for element, _ in EVERY_ELEMENT)


def test_counts() -> None:
    print(f"formats: {len(EVERY_ELEMENT)} element formats, {CODES} codes")
    assert len(EVERY_ELEMENT) == 117
    assert CODES == 13_104


by_element = pytest.mark.parametrize(
    ("element", "twin"), EVERY_ELEMENT, ids=[str(element) for element, _ in EVERY_ELEMENT]
)


@by_element
def test_every_code_has_the_value_of_its_bit_fields(element: ElementFormat, twin: Element) -> None:
    assert element.bits == twin.bits
    assert len(element.values) == 2**twin.bits
    # float.hex tells -0.0 from 0.0 and spells every NaN alike.
    assert [v.hex() for v in element.values] == [v.hex() for v in twin.values]


@by_element
def test_derived_properties_follow_from_the_codes(element: ElementFormat, twin: Element) -> None:
    values = element.values
    positive = sorted({v for v in values if math.isfinite(v) and v > 0})
    assert element.largest == positive[-1] == max(-v for v in symmetric(element) if v < 0)
    assert (
        Fraction(2) ** element.emax <= Fraction(element.largest) < Fraction(2) ** (element.emax + 1)
    )
    assert element.smallest == positive[0]
    assert element.has_negative_zero == any(v == 0 and math.copysign(1, v) < 0 for v in values)
    assert element.has_nan == any(math.isnan(v) for v in values)
    assert element.has_inf == (math.inf in values) == (-math.inf in values)
    assert element.is_integer == bool(twin.integer)
    assert element.mantissa_bits == twin.width


def symmetric(element: ElementFormat) -> list[float]:
    """Finite values without the most negative code of an integer, which is never produced."""
    codes = range(2**element.bits)
    skip = 2 ** (element.bits - 1) if element.is_integer else -1
    return [element.values[c] for c in codes if c != skip and math.isfinite(element.values[c])]


@by_element
def test_special_codes_decode_as_what_they_are(element: ElementFormat, twin: Element) -> None:
    if twin.has_nan:
        assert element.nan_code is not None
        assert math.isnan(element.values[element.nan_code])
    else:
        assert element.nan_code is None
    if twin.has_inf:
        assert element.inf_code is not None
        assert element.values[element.inf_code] == math.inf
    else:
        assert element.inf_code is None


@by_element
def test_normal_values_start_where_the_spacing_first_doubles(
    element: ElementFormat, twin: Element
) -> None:
    spacing = Fraction(element.smallest)
    if element.is_integer:
        assert element.smallest_normal is None
        assert element.smallest_subnormal is None
        steps = {
            high - low for low, high in zip(twin.magnitudes, twin.magnitudes[1:], strict=False)
        }
        assert steps == {spacing}
        return
    assert element.smallest_normal == 2.0**element.emin == 2.0 ** (1 - element.bias)
    if element.mantissa_bits:
        # The first 2^m magnitudes are zero and the subnormals, evenly spaced; then a normal.
        count = 2**element.mantissa_bits
        assert twin.magnitudes[count] == Fraction(element.smallest_normal)
        assert element.smallest_subnormal == float(twin.magnitudes[1])
        assert [k * spacing for k in range(count)] == list(twin.magnitudes[:count])
    else:
        assert element.smallest_subnormal is None
        assert element.smallest == element.smallest_normal


OCP = {
    # OCP MX v1.0, tables of section 5.3: bias, emax, largest, smallest normal, largest subnormal,
    # smallest subnormal, number of NaN codes, number of Inf codes.
    E4M3: (7, 8, 448.0, 2.0**-6, 2.0**-6 * 0.875, 2.0**-9, 2, 0),
    E5M2: (15, 15, 57344.0, 2.0**-14, 2.0**-14 * 0.75, 2.0**-16, 6, 2),
    E2M3: (1, 2, 7.5, 1.0, 0.875, 0.125, 0, 0),
    E3M2: (3, 4, 28.0, 0.25, 0.1875, 0.0625, 0, 0),
    E2M1: (1, 2, 6.0, 1.0, 0.5, 0.5, 0, 0),
}


@pytest.mark.parametrize("element", OCP, ids=str)
def test_the_ocp_tables(element: ElementFormat) -> None:
    bias, emax, largest, normal, subnormal, smallest, nans, infinities = OCP[element]
    assert (element.bias, element.emax, element.largest) == (bias, emax, largest)
    assert (element.smallest_normal, element.smallest_subnormal) == (normal, smallest)
    assert max(v for v in element.values if v < normal) == subnormal
    assert sum(map(math.isnan, element.values)) == nans
    assert sum(map(math.isinf, element.values)) == infinities
    assert element.has_negative_zero


def test_ocp_codes_by_hand() -> None:
    assert E4M3.values[0b0_1111_110] == 448.0
    assert math.isnan(E4M3.values[0b1_1111_111])
    assert E5M2.values[0b0_11110_11] == 57344.0
    assert E5M2.values[0b1_11111_00] == -math.inf
    assert E2M3.values[0b0_11_111] == 7.5
    assert E3M2.values[0b1_111_11] == -28.0
    assert E2M1.values[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def test_integers_by_hand() -> None:
    # OCP MX v1.0, 5.3.4: two's complement with six fraction bits; 0x80 is -2, left unused.
    assert (INT8.values[1], INT8.values[0x7F], INT8.values[0x80]) == (1 / 64, 127 / 64, -2.0)
    assert (INT8.largest, INT8.emax, INT8.emin, INT8.mantissa_bits) == (127 / 64, 0, 0, 6)
    full = integer_format(8, "full")
    assert (full.lowest, full.largest, INT8.lowest) == (-2.0, 127 / 64, -127 / 64)
    assert (INT4.values[1], INT4.values[7], INT4.values[8]) == (0.25, 1.75, -2.0)
    assert integer_format(2).values == (0.0, 1.0, -2.0, -1.0)


def test_fnuz_as_in_the_paper() -> None:
    # arXiv 2309.17224, after 2206.02915: E4 has bias 8, maximum 240; only the code of -0 is NaN.
    e4, e5 = float_format(4, 3, "fnuz"), float_format(5, 2, "fnuz")
    assert (e4.bias, e4.largest, e4.smallest_subnormal) == (8, 240.0, 2.0**-10)
    assert (e5.bias, e5.largest, e5.smallest_subnormal) == (16, 57344.0, 2.0**-17)
    assert [code for code in range(256) if math.isnan(e4.values[code])] == [0x80]
    assert float_format(4, 3, "fnuz", 11).largest == 30.0


SCALE_FACTS = {
    # name: bits, power of two, smallest, largest
    E8M0: ("e8m0", 8, True, 2.0**-127, 2.0**127),
    **{
        exponent_scale(bits): (f"e{bits}m0", bits, True, 2.0 ** -(2 ** (bits - 1) - 1), largest)
        for bits, largest in zip(
            range(2, 8), (2.0, 8.0, 2.0**7, 2.0**15, 2.0**31, 2.0**63), strict=True
        )
    },
    UNIT: ("unit", 16, True, 1.0, 1.0),
    POW2: ("pow2", 16, True, 2.0**-1022, 2.0**1022),
    SCALE_E4M3: ("e4m3", 8, False, 2.0**-9, 448.0),
    UE5M3: ("ue5m3", 8, False, 2.0**-17, 61440.0),
    BF16: ("bf16", 16, False, 2.0**-133, 2.0**127 * (2 - 2.0**-7)),
    FP32: ("fp32", 32, False, 2.0**-149, 2.0**127 * (2 - 2.0**-23)),
}


@pytest.mark.parametrize("scale", SCALE_FACTS, ids=str)
def test_scale_formats(scale: ScaleFormat) -> None:
    name, bits, power_of_two, smallest, largest = SCALE_FACTS[scale]
    assert (scale.name, str(scale), SCALES[name]) == (name, name, scale)
    assert (scale.bits, scale.is_power_of_two) == (bits, power_of_two)
    assert (scale.smallest, scale.largest) == (smallest, largest)


def test_the_table_of_scales_is_whole() -> None:
    assert set(SCALES.values()) == set(SCALE_FACTS)


@pytest.mark.parametrize(
    ("fmt", "element", "scale", "block", "bits"),
    [
        (MXFP8_E4M3, E4M3, E8M0, 32, 8.25),
        (MXFP8_E5M2, E5M2, E8M0, 32, 8.25),
        (MXFP6_E2M3, E2M3, E8M0, 32, 6.25),
        (MXFP6_E3M2, E3M2, E8M0, 32, 6.25),
        (MXFP4, E2M1, E8M0, 32, 4.25),
        (MXINT8, INT8, E8M0, 32, 8.25),
        (NVFP4, E2M1, SCALE_E4M3, 16, 4.5),
    ],
    ids=lambda value: str(value) if isinstance(value, BlockFormat) else None,
)
def test_concrete_formats(
    fmt: BlockFormat, element: ElementFormat, scale: ScaleFormat, block: int, bits: float
) -> None:
    assert (fmt.element, fmt.scale, fmt.block) == (element, scale, block)
    assert fmt.bits_per_value == bits
    assert fmt.rule == ("floor" if scale is E8M0 else "amax")
    assert fmt.tensor_scale == (FP32 if fmt is NVFP4 else None)


@pytest.mark.parametrize("fmt", [MXFP4, MXFP6_E2M3, MXFP8_E5M2, MXINT8, NVFP4], ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (64,), (2, 3, 128), (0, 32)])
def test_stored_bits_of_whole_blocks(fmt: BlockFormat, shape: tuple[int, ...]) -> None:
    outer = 32 if fmt is NVFP4 else 0
    assert fmt.storage_bits(shape, -1) == math.prod(shape) * fmt.bits_per_value + outer


@pytest.mark.parametrize(
    ("spelling", "shape", "axis", "bits"),
    [
        ("mxfp4", (3, 33), -1, 3 * (64 * 4 + 2 * 8)),  # padded to two blocks
        ("mxfp4", (33, 3), 0, 3 * (64 * 4 + 2 * 8)),
        ("mxfp6_e2m3", (5,), 0, 32 * 6 + 8),
        ("mxfp4", (), -1, 32 * 4 + 8),
        ("int8-tensor", (3, 5), -1, 15 * 8 + 32),
        ("int8-channel", (3, 5), -1, 15 * 8 + 3 * 32),
        ("int8-channel", (3, 5), 0, 15 * 8 + 5 * 32),
        ("int8-token", (2, 3, 5), -1, 30 * 8 + 6 * 32),
        ("int8-token", (2, 3, 5), 1, 30 * 8 + 10 * 32),
        ("int4-channel", (3, 5), -1, 3 * 24 + 3 * 32),  # rows of five nibbles take three bytes
        (
            "e3m2-5",
            (2, 7),
            -1,
            2 * 72 + 4 * 8,
        ),  # ten codes of 6 bits, filled up to three groups of four
        ("nvfp4", (2, 17), -1, 2 * 32 * 4 + 4 * 8 + 32),
    ],
)
def test_stored_bits_by_hand(spelling: str, shape: tuple[int, ...], axis: int, bits: int) -> None:
    assert get_block_format(spelling).storage_bits(shape, axis) == bits


RULES: dict[bool, list[ScaleRule]] = {
    True: [ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.EVEN, ScaleRule.RCEIL],
    False: [ScaleRule.AMAX],
}


def every_block_format() -> list[BlockFormat]:
    blocks = (1, 3, 16, 32, 128, (32, 32), (1, 16), "channel", "token", "tensor")
    formats = [
        BlockFormat(element, scale, block, rule, outer)  # type: ignore[arg-type]
        for element, _ in EVERY_ELEMENT
        for scale in SCALE_FACTS
        for block in blocks
        for rule in (RULES[scale.is_power_of_two] if scale != UNIT else [ScaleRule.FLOOR])
        for outer in ((None,) if scale.is_power_of_two else (None, FP32))
    ]
    return formats + [
        replace(fmt, zero_point=True)
        for fmt in formats
        if fmt.element.is_integer
        and fmt.element.specials == "finite"
        and not fmt.scale.is_power_of_two
        and fmt.tensor_scale is None
    ]


def test_every_spelling_reads_back_as_its_format() -> None:
    formats = every_block_format()
    spellings = [str(fmt) for fmt in formats]
    assert len(set(spellings)) == len(set(formats)) == len(formats) > 10_000
    for fmt, spelling in zip(formats, spellings, strict=True):
        assert get_format(spelling) == fmt
        assert fmt.name == spelling == spelling.lower()


@by_element
def test_every_element_reads_back_in_any_case(element: ElementFormat, twin: Element) -> None:
    assert get_format(str(element)) == element
    assert get_format(str(element).upper()) == element
    assert get_format(element) is element
    prefixed = f"fp{twin.bits}_{element}"
    if not element.is_integer:
        assert get_format(prefixed) == element


def test_element_and_block_formats_never_share_a_name() -> None:
    elements = {str(element) for element, _ in EVERY_ELEMENT}
    assert elements.isdisjoint(NAMED)
    assert set(ELEMENTS) == {"e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8", "int4"}


def test_named_formats_are_spelled_as_they_are_listed() -> None:
    for name, fmt in NAMED.items():
        assert str(fmt) == name
        assert get_format(name) == get_format(name.upper()) == get_format(f" {name}\n") == fmt
    wanted = {"mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"}
    wanted |= {
        f"{e}-{b}" for e in ("int8", "int4", "fp8_e4m3") for b in ("channel", "token", "tensor")
    }
    assert wanted <= set(NAMED)


@pytest.mark.parametrize(
    ("spelling", "same"),
    [
        ("mxfp4-rceil", BlockFormat(E2M1, E8M0, 32, ScaleRule.RCEIL)),
        ("MXFP4-FLOOR", MXFP4),
        ("fp4_e2m1-16", BlockFormat(E2M1, E8M0, 16)),
        ("e2m1-32", MXFP4),
        ("mxfp4-16", BlockFormat(E2M1, E8M0, 16)),
        ("int8-channel", BlockFormat(INT8, FP32, "channel")),
        ("int8-32", MXINT8),
        ("e3m0-32", BlockFormat(float_format(3, 0), E8M0, 32)),
        ("fp4_e2m1-16-ue5m3", BlockFormat(E2M1, UE5M3, 16)),
        ("fp8_e4m3-32x32-e8m0-ceil", BlockFormat(E4M3, E8M0, (32, 32), ScaleRule.CEIL)),
        ("fp8_e4m3-tensor-bf16", BlockFormat(E4M3, BF16, "tensor")),
        ("fp8_e4m3fnuz-tensor-pow2", BlockFormat(float_format(4, 3, "fnuz"), POW2, "tensor")),
        ("e4m3b11fnuz-tensor", BlockFormat(float_format(4, 3, "fnuz", 11), FP32, "tensor")),
    ],
)
def test_spellings_by_hand(spelling: str, same: BlockFormat) -> None:
    assert get_format(spelling) == get_block_format(spelling) == same


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("mxfp44", r"'mxfp44' is not known\. Did you mean .*mxfp4"),
        ("mxint9", r"'mxint9' is not known\. Did you mean .*mxint8"),
        ("nvfp5", r"'nvfp5' is not known\. Did you mean .*nvfp4"),
        ("mxfp6_e2m4", r"'mxfp6_e2m4' is not known\. Did you mean .*mxfp6_e2m3"),
        ("zebra", "'zebra' is not known"),
        ("", "'' is not known"),
        ("-32", "'-32' is not known"),
        ("mxfp4-flor", r"'mxfp4-flor': option 'flor' is not known\. Did you mean .*floor"),
        ("e2m1-chanel", r"option 'chanel' is not known\. Did you mean .*channel"),
        ("int8-channel-", "option '' is not known"),
        ("e2m1-floor", "names no block; add one"),
        ("int8-0", "block size 0 is not positive"),
        ("mxfp4-0x32", "block size 0 is not positive"),
        ("mxfp4-amax", "rule amax does not apply to the scale format e8m0; use floor or ceil"),
        ("int8-channel-floor", "rule floor does not apply to the scale format fp32; use amax"),
        ("nvfp4-e8m0", "tensor scale needs real-valued scales"),
        ("int9-32", "int9: integers of 2 to 8 bits"),
        ("int1", "int1: integers of 2 to 8 bits"),
        ("e5m3-32", "e5m3 has 9 bits; floats of 2 to 8 bits"),
        ("e0m3-32", "e0m3"),
        ("e3m0ieee", "e3m0 of kind ieee has no mantissa bit"),
        ("e1m0fn", "e1m0 of kind fn has no codes left"),
        ("e4m3b65", "e4m3 has bias 65; biases from 0 to 64"),
        ("fp6_e2m1-32", "e2m1 has 4 bits, not 6"),
        ("mxfp4-tensor_e8m0", "tensor scale needs real-valued scales"),
        ("mxfp4-16-32", "'mxfp4-16-32'.*16.*32"),
        ("mxfp4-ceil-floor", "'mxfp4-ceil-floor'.*ceil.*floor"),
        ("e2m1-32-pow2-e8m0", "'e2m1-32-pow2-e8m0'.*pow2.*e8m0"),
        ("int" + "9" * 5000, "int"),
        ("mxfp4-" + "9" * 5000, "mxfp4"),
    ],
)
def test_bad_spellings_are_refused_with_near_names(spelling: str, message: str) -> None:
    with pytest.raises(MicroscaleError, match=message):
        get_format(spelling)


def test_an_element_is_no_block_format() -> None:
    with pytest.raises(MicroscaleError, match=r"e4m3 is an element format.*fp8_e4m3-32"):
        get_block_format("e4m3")


def test_what_is_no_spelling_is_refused() -> None:
    with pytest.raises(MicroscaleError, match="4 is neither a spelling nor a format"):
        get_format(4)  # type: ignore[arg-type]


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="zebra"):
        get_format("zebra")


@pytest.mark.parametrize("record", [E4M3, E8M0, MXFP4, NVFP4], ids=repr)
def test_records_are_frozen_and_hashable(
    record: ElementFormat | ScaleFormat | BlockFormat,
) -> None:
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)
    twin = dataclasses.replace(record)
    assert twin == record
    assert hash(twin) == hash(record)
    assert len({twin, record}) == 1


def test_different_formats_are_different() -> None:
    formats = every_block_format()
    assert len(set(formats)) == len(formats)
    assert BlockFormat(E2M1, E8M0, 32, ScaleRule.CEIL) != MXFP4
    assert float_format(4, 3, "fnuz") != E4M3


def test_a_rule_may_be_a_plain_string() -> None:
    fmt = BlockFormat(E2M1, E8M0, 32, "rceil")  # type: ignore[arg-type]
    assert fmt.rule is ScaleRule.RCEIL
    with pytest.raises(MicroscaleError, match=r"'cei' is not known\. Did you mean ceil"):
        BlockFormat(E2M1, E8M0, 32, "cei")  # type: ignore[arg-type]


@pytest.mark.parametrize("block", ["chanel", "row"])
def test_unknown_whole_blocks_are_refused(block: str) -> None:
    with pytest.raises(MicroscaleError, match=f"'{block}' is not known"):
        BlockFormat(E2M1, E8M0, block)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [True, 32.0, None, (32,), (32, 0), (0, 32), (1, 2, 3), -1])
def test_blocks_that_are_no_blocks_are_refused(block: object) -> None:
    with pytest.raises(MicroscaleError, match="block"):
        BlockFormat(E2M1, E8M0, block)  # type: ignore[arg-type]


def test_records_take_records_not_spellings() -> None:
    with pytest.raises(MicroscaleError, match="e2m1"):
        BlockFormat("e2m1", E8M0, 32)  # type: ignore[arg-type]
    with pytest.raises(MicroscaleError, match="e8m0"):
        BlockFormat(E2M1, "e8m0", 32)  # type: ignore[arg-type]


def test_unknown_kinds_of_specials_are_refused() -> None:
    with pytest.raises(MicroscaleError, match=r"nan.*finite, fn, fnuz"):
        float_format(4, 3, "nan")  # type: ignore[arg-type]
