"""The oracles are tested too: against literal values, numpy and each other."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest

import oracle
from oracle import ELEMENTS, MX, NVFP4, Options, cast_block
from oracle_arrays import (
    NAN_EXPONENT,
    bits,
    cast_rows,
    cast_rows_real,
    cast_two_level,
    round_output,
)
from oracle_numbers import DTYPES, Element, float_element, power, round_to


def options_of(element: Element) -> list[Options]:
    """Every combination that the element can express."""
    overflows = ["saturate", "nonfinite"] if element.has_nan else ["saturate"]
    return [
        Options(rounding, overflow, nonfinite, flush)
        for rounding in ("even", "away", "zero")
        for overflow in overflows
        for nonfinite in ("block", "element")
        for flush in ("off", "element", "block")
    ]


def float32(value: float) -> float:
    return round_to(value, "float32")


def awkward_rows(count: int, seed: int) -> list[list[float]]:
    """Rows of four float32 values: wide and narrow ranges, ties, zeros, subnormals, NaN, Inf."""
    draw = random.Random(seed)
    special = [0.0, -0.0, math.nan, math.inf, -math.inf, 2.0**-149, 2.0**-126, 3.4028234e38]
    rows = []
    for _ in range(count):
        top = draw.choice([*range(-148, 128), *range(-130, -120), 127])
        row = []
        for _ in range(4):
            mantissa = draw.choice([1.0, 1.25, 1.5, 1.75, 1.9375, 2 - 2.0**-23, 1 + draw.random()])
            value = math.ldexp(mantissa, top - draw.choice([0, 0, 1, 2, 5, 9]))
            row.append(float32(draw.choice([-1, 1]) * min(value, 3.4e38)))
        if draw.random() < 0.3:
            row[draw.randrange(4)] = draw.choice(special)
        rows.append([float32(value) for value in row])
    return rows


def test_rounding_to_float_types_agrees_with_numpy() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        value = math.ldexp(draw.choice([-1, 1]) * (1 + draw.random()), draw.randrange(-160, 130))
        with np.errstate(over="ignore"):
            assert bits(np.array([round_to(value, "float32")])) == bits(
                np.array([np.float32(value)], np.float64)
            )
            assert round_to(value, "float16") == float(np.float16(value))


def test_array_rounding_agrees_with_exact_rounding() -> None:
    draw = random.Random(2)
    values = [math.ldexp(1 + draw.random(), draw.randrange(-160, 130)) for _ in range(1000)]
    values += [0.0, -0.0, math.inf, math.nan, 65520.0, 65519.999, 2.0**-25, 2.0**-24]
    array = np.array(values)
    for dtype in DTYPES:
        expected = np.array([round_to(value, dtype) for value in values])
        assert (bits(round_output(array, dtype)) == bits(expected)).all()


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("int4", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
    ],
)
def test_grids_by_hand(name: str, magnitudes: list[float]) -> None:
    assert [float(m) for m in ELEMENTS[name].magnitudes] == magnitudes


def test_one_block_by_hand() -> None:
    # amax 7 has exponent 2 = emax of E2M1, so the scale is 1 and 7 saturates; 2.5 ties to 2.
    block = cast_block(
        [7.0, 2.5, -0.2, -0.25], MX["mxfp4"], Options(), compute="float32", out="float32"
    )
    assert block.scale == 1.0
    assert block.values[:2] == (6.0, 2.0)
    assert [math.copysign(1, v) * abs(v) for v in block.values[2:]] == [-0.0, -0.0]
    assert block.codes == (7, 4, 8, 8)


def test_rceil_is_exact_one_ulp_above_the_boundary() -> None:
    amax = Fraction(6) * power(-100)
    ulp = power(-121)
    element = ELEMENTS["e2m1"]
    assert oracle.shared_exponent(amax, element, "rceil") == -100
    assert oracle.shared_exponent(amax + ulp, element, "rceil") == -99


@pytest.mark.parametrize("name", sorted(MX))
@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil", "seven_quarters"])
def test_arrays_agree_with_the_exact_oracle_for_powers_of_two(name: str, rule: str) -> None:
    fmt = oracle.with_rule(MX[name], rule)
    rows = awkward_rows(40, seed=3)
    for options in options_of(fmt.element):
        exact = [cast_block(r, fmt, options, compute="float32", out="float32") for r in rows]
        cast = cast_rows(np.array(rows), fmt, options)
        got = round_output(cast.values, "float32")
        assert (bits(got) == bits(np.array([block.values for block in exact]))).all()
        scales = [NAN_EXPONENT if math.isnan(b.scale) else math.log2(b.scale) for b in exact]
        assert cast.scales.tolist() == scales


@pytest.mark.parametrize("scale", [oracle.FP32, oracle.BF16, oracle.E4M3, oracle.UE5M3])
@pytest.mark.parametrize("element", ["int8", "int4", "e4m3", "e5m2", "e2m1"])
def test_arrays_agree_with_the_exact_oracle_for_real_scales(
    element: str, scale: oracle.Scale
) -> None:
    fmt = oracle.real(element, 4, scale)
    rows = awkward_rows(40, seed=4)
    for options in options_of(fmt.element):
        exact = [cast_block(r, fmt, options, compute="float32", out="float32") for r in rows]
        cast = cast_rows_real(np.array(rows), fmt, options, compute="float32")
        assert (bits(cast.values) == bits(np.array([block.values for block in exact]))).all()
        assert (bits(cast.scales) == bits(np.array([block.scale for block in exact]))).all()


def test_two_levels_by_hand() -> None:
    # amax 2688 = 448 x 6 makes the tensor scale 1; a block of amax 12 gets the scale 2.
    cast = oracle.cast_two_level(
        [[2688.0, 1.0], [12.0, -5.1]], NVFP4, Options(), compute="float32", out="float32"
    )
    assert cast.tensor_scale == 1.0
    assert [block.scale for block in cast.blocks] == [448.0, 2.0]
    assert cast.blocks[0].values == (2688.0, 0.0)
    assert cast.blocks[1].values == (12.0, -6.0)


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_arrays_agree_with_the_exact_oracle_for_two_levels(compute: str) -> None:
    tiny = [[float32(value * 2.0**-140) for value in row] for row in awkward_rows(6, seed=5)]
    for rows in (awkward_rows(8, seed=6), awkward_rows(8, seed=7), tiny, [[0.0, -0.0]], tiny[:1]):
        for options in options_of(NVFP4.element):
            exact = oracle.cast_two_level(rows, NVFP4, options, compute=compute, out="float64")
            cast = cast_two_level(np.array(rows), NVFP4, options, compute=compute)
            values = np.array([block.values for block in exact.blocks])
            assert (bits(cast.values) == bits(values)).all()
            scales = np.array([block.scale for block in exact.blocks])
            assert (bits(cast.scales) == bits(scales)).all()


def test_packing_by_hand() -> None:
    assert oracle.pack([0x1, 0x2, 0xF], 4) == bytes([0x21, 0x0F])
    assert oracle.pack([0b000001, 0b000010, 0b000011, 0b000100], 6) == bytes([0x81, 0x30, 0x10])
    assert oracle.unpack(oracle.pack([5, 1, 7, 2, 3], 3), 3, 5) == [5, 1, 7, 2, 3]


def test_ties_without_mantissa_bits_go_up() -> None:
    # IEEE 754-2019 4.3.1, and what ml_dtypes and torch do for E8M0; but 0 is even.
    element = float_element(3, 0)
    options = Options()
    for value, rounded in ((1.5, 2.0), (3.0, 4.0), (6.0, 8.0), (0.125, 0.0), (0.1251, 0.25)):
        assert oracle.encode(element, Fraction(value), negative=False, options=options) == rounded


def test_the_oracle_knows_fnuz() -> None:
    element = float_element(4, 3, "fnuz")
    assert float(element.largest) == 240.0
    assert math.isnan(element.decode(0x80))
    assert not element.has_negative_zero
