"""Casts of every code, every midpoint, every scale and every half-precision value there is.

Nothing is sampled here where it can be enumerated. Expected values come from the exact grids of
`oracle_arrays`, or, for midpoints, straight from the neighbours. `test_counts` adds up the cases
(run it with -s to see them) and pins their number, so that none can go missing unseen.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import oracle
from microscale.cast import cast
from microscale.formats import BlockFormat
from microscale.spelling import get_block_format
from microscale.tensor import quantize
from oracle import MX, Format, Options
from oracle_arrays import (
    TORCH,
    Floats,
    all_halves,
    assert_same,
    cast_rows,
    cast_rows_real,
    cast_two_level,
    grid,
    round_output,
    to_numpy,
)
from oracle_numbers import DTYPES, Element, float_element, tie_goes_up
from twins import every_element

ROUNDINGS = ("even", "away", "zero")
RULES = ("floor", "ceil", "even", "rceil", "seven_quarters")


by_element = pytest.mark.parametrize("name", sorted(every_element()))
by_mx = pytest.mark.parametrize("name", sorted(MX))


def overflows(element: Element) -> tuple[str, ...]:
    return ("saturate", "nonfinite") if element.has_nan else ("saturate",)


def run(x: torch.Tensor, fmt: str | BlockFormat, options: Options) -> torch.Tensor:
    return cast(
        x,
        fmt,
        rounding=options.rounding,
        overflow=options.overflow,
        nonfinite=options.nonfinite,
        flush_subnormals=options.flush,
    )


# ---------------------------------------------------------------- every code


def numbers(element: Element) -> Floats:
    """The finite values of all codes but the most negative one of integers."""
    values = [value for value in element.values if math.isfinite(value)]
    return np.array([value for value in values if abs(value) <= element.largest], np.float64)


def scale_exponents(name: str) -> range:
    """All scales of E8M0 for the elements of MX, a few for the others."""
    mx = {"e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "int8"}
    return range(-127, 128) if name in mx else range(-127, 128, 42)


@by_element
def test_every_code_is_a_fixed_point_at_every_scale(name: str) -> None:
    element, twin = every_element()[name]
    fmt = BlockFormat(element, get_block_format("mxfp4").scale, 32)
    values = numbers(twin)
    # The largest value beside each one holds the scale.
    rows = np.stack([values, np.full_like(values, float(twin.largest))], axis=1)
    scales = 2.0 ** np.array(scale_exponents(name))
    x = (scales[:, None, None] * rows).reshape(-1, 2)
    for rounding in ROUNDINGS:
        assert_same(cast(torch.from_numpy(x), fmt, rounding=rounding), x)


@by_mx
def test_every_code_is_a_fixed_point_in_float32(name: str) -> None:
    values = numbers(MX[name].element)
    rows = np.stack([values, np.full_like(values, float(MX[name].element.largest))], axis=1)
    scales = 2.0 ** np.arange(-127, 128 - MX[name].element.emax)
    x = (scales[:, None, None] * rows).reshape(-1, 2)
    x32 = torch.from_numpy(x).float()
    assert_same(x32, x)
    assert_same(cast(x32, name), x)


# ---------------------------------------------------------------- every midpoint


@dataclass(frozen=True)
class Midpoints:
    """The three floats around every midpoint, and what each rounding makes of them."""

    x: Floats
    expected: dict[str, Floats]


def midpoints(element: Element, exponent: int, dtype: str, beyond: float) -> Midpoints:
    """Midpoints of neighbours, the one past the largest value included, at a scale 2**exponent.

    `beyond` is what a value becomes that rounds past the largest.
    """
    kind = np.float32 if dtype == "float32" else np.float64
    middles = grid(element).middles * 2.0**exponent
    assert (middles.astype(kind) == middles).all()
    below = np.nextafter(middles.astype(kind), kind(0)).astype(np.float64)
    above = np.nextafter(middles.astype(kind), kind(np.inf)).astype(np.float64)
    x = np.concatenate([below, middles, above])
    positive = _magnitudes(element, beyond)
    # Full integers have one more code below zero.
    negative = _magnitudes(element, float(element.beyond) if element.specials == "full" else beyond)
    expected = {
        rounding: np.concatenate([positive[rounding], _negated(negative[rounding], element)])
        for rounding in positive
    }
    return Midpoints(np.concatenate([x, -x]), {k: v * 2.0**exponent for k, v in expected.items()})


def _magnitudes(element: Element, beyond: float) -> dict[str, Floats]:
    """What each rounding makes of the floats below, at and above every midpoint."""
    ends = [*map(float, element.magnitudes), beyond]
    low, high = np.array(ends[:-1]), np.array(ends[1:])
    up = [tie_goes_up(element, place, "even") for place in range(len(low))]
    even = np.where(up, high, low)
    return {
        "even": np.concatenate([low, even, high]),
        "away": np.concatenate([low, high, high]),
        "zero": np.concatenate([low, low, low]),
    }


def _negated(value: Floats, element: Element) -> Floats:
    return -value if element.has_negative_zero else np.where(value == 0, 0.0, -value)


MIDPOINT_SCALES = [("float32", -30), ("float32", 0), ("float64", -127), ("float64", 127)]


@by_element
def test_every_midpoint_and_the_floats_beside_it(name: str) -> None:
    element, twin = every_element()[name]
    fmt = BlockFormat(element, get_block_format("mxfp4").scale, 32)
    largest = float(twin.largest)
    for overflow in overflows(twin):
        special = math.inf if twin.has_inf else math.nan
        beyond = largest if overflow == "saturate" else special
        for dtype, exponent in MIDPOINT_SCALES:
            case = midpoints(twin, exponent, dtype, beyond)
            rows = np.stack([case.x, np.full_like(case.x, largest * 2.0**exponent)], axis=1)
            x = torch.from_numpy(rows).to(TORCH[dtype])
            for rounding in ROUNDINGS:
                values = run(x, fmt, Options(rounding, overflow))
                assert_same(values[:, 0], case.expected[rounding], x[:, 0])
                assert_same(values[:, 1], rows[:, 1])


# ---------------------------------------------------------------- every scale


def boundaries(element: Element) -> Floats:
    """Mantissas in [1, 2) at which some rule changes its mind, with the float32 beside each."""
    width = element.width
    points = [1.0, 1.25, 1.5, 2.0 - 2.0 ** -(width + 1), 2.0 - 2.0**-width]
    points.append(float(element.largest) / 2.0**element.emax)
    ulp = 2.0**-23
    around = {point + k * ulp for point in points for k in (-1, 0, 1)} | {2.0 - ulp}
    return np.array(sorted(m for m in around if 1.0 <= m < 2.0))


def scale_rows(element: Element, dtype: str) -> Floats:
    """Blocks of four whose amax is each boundary mantissa in each binade that matters."""
    last = 128 + element.emax if dtype == "float64" else 127
    binades = 2.0 ** np.arange(-149, last + 1)
    amax = (binades[:, None] * boundaries(element)).reshape(-1)
    amax = np.unique(round_output(amax, dtype))
    return np.stack([amax, -amax / 3, amax * 0.7, -amax / 2**6], axis=1)


@by_mx
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_scale_code_of_e8m0(name: str, dtype: str) -> None:
    x = torch.from_numpy(scale_rows(MX[name].element, dtype)).to(TORCH[dtype])
    for rule in RULES:
        fmt = oracle.with_rule(MX[name], rule)
        expected = cast_rows(to_numpy(x), fmt, Options())
        packed = quantize(x, f"{name}-{rule}")
        codes = packed.scales.reshape(-1).numpy().astype(np.int64)
        assert (codes == expected.scales + 127).all()
        top = 254 if dtype == "float64" else int(codes.max())
        assert set(codes.tolist()) == set(range(top + 1))
        assert top >= 254 - MX[name].element.emax
        assert_same(cast(x, f"{name}-{rule}"), round_output(expected.values, dtype), x)


@pytest.mark.parametrize("rule", RULES)
def test_every_scale_exponent_without_a_bound(rule: str) -> None:
    element = oracle.ELEMENTS["e2m1"]
    fmt = Format(element, oracle.POW2, rule)
    amax = (2.0 ** np.arange(-1022, 1024)[:, None] * boundaries(element)).reshape(-1)
    x = torch.from_numpy(np.stack([amax, -amax / 4, amax * 0.75], axis=1))
    expected = cast_rows(to_numpy(x), fmt, Options())
    packed = quantize(x, f"fp4_e2m1-32-pow2-{rule}")
    assert packed.scales.dtype == torch.int16
    exponents = packed.scales.reshape(-1).numpy().astype(np.int64)
    assert (exponents == expected.scales).all()
    assert exponents.min() == -1022
    assert exponents.max() == 1021 + (rule != "floor")
    assert_same(cast(x, f"fp4_e2m1-32-pow2-{rule}"), expected.values, x)


def real_scale_rows(scale: oracle.Scale, element: Element, dtype: str) -> Floats:
    """Blocks that lead to every value of a scale format and to every midpoint between two."""
    kind = np.float32 if dtype == "float32" else np.float64
    assert scale.binary is not None
    smallest = 2.0 ** (scale.binary.emin - scale.binary.precision + 1)
    top = math.frexp(float(scale.binary.largest))[1] - 1
    width = 2 ** (scale.binary.precision - 1)
    subnormal = smallest * np.arange(1, width)
    normal = 2.0 ** np.arange(scale.binary.emin, top + 1)[:, None] * (1 + np.arange(width) / width)
    values = np.concatenate([subnormal, normal.reshape(-1)])
    values = values[values <= float(scale.binary.largest)]
    between = (np.concatenate([[0.0], values[:-1]]) + values) / 2
    wide = np.concatenate([values, between]) * float(element.largest)
    exact = wide[wide <= float(DTYPES[dtype].largest)].astype(kind)
    beside = [np.nextafter(exact, kind(0)), np.nextafter(exact, kind(np.inf))]
    amax = np.concatenate([exact, *beside]).astype(np.float64)
    return np.stack([amax, -amax / 3, amax * 0.7, -amax / 64], axis=1)


REAL_SCALES = {
    "e4m3": (oracle.E4M3, 126),
    "ue5m3": (oracle.UE5M3, 247),
    "bf16": (oracle.BF16, 32639),
}


@pytest.mark.parametrize("scale", REAL_SCALES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_value_of_the_real_scales(scale: str, dtype: str) -> None:
    form, count = REAL_SCALES[scale]
    element = oracle.ELEMENTS["e2m1"]
    rows = real_scale_rows(form, element, dtype)
    x = torch.from_numpy(rows).to(TORCH[dtype])
    fmt = Format(element, form, "amax")
    expected = cast_rows_real(to_numpy(x), fmt, Options(), compute=dtype)
    reached = np.unique(expected.scales)
    assert len(reached) == count + 1 if dtype == "float64" else len(reached) > count * 0.98
    assert_same(cast(x, f"fp4_e2m1-32-{scale}"), round_output(expected.values, dtype), x)
    packed = quantize(x, f"fp4_e2m1-32-{scale}")
    stored = packed.scales.reshape(-1)
    if scale == "bf16":
        assert_same(stored, expected.scales)
    else:
        twin = float_element(4, 3, "fn") if scale == "e4m3" else _UE5M3
        assert stored.dtype == torch.uint8
        decoded = np.array(twin.values)[stored.numpy()]
        assert (decoded == expected.scales).all()


_UE5M3 = Element(5, 3, "ieee", 15)


def two_level_rows(dtype: str) -> Floats:
    """Blocks under the tensor scale 1 that lead to every E4M3 scale; the first one holds it."""
    rows = real_scale_rows(oracle.E4M3, oracle.ELEMENTS["e2m1"], dtype)
    rows = rows[rows[:, 0] <= 2688.0]
    return np.concatenate([[[2688.0, 2500.0, -100.0, 0.0]], rows])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [1.0, 2.0**-100, 0.7])
def test_every_block_scale_of_nvfp4(dtype: str, factor: float) -> None:
    rows = two_level_rows(dtype) * factor
    x = torch.from_numpy(rows).to(TORCH[dtype])
    for rounding in ROUNDINGS:
        options = Options(rounding)
        expected = cast_two_level(to_numpy(x), oracle.NVFP4, options, compute=dtype)
        # Every block is a row: a ragged block of four.
        assert_same(run(x, "nvfp4", options), round_output(expected.values, dtype), x)
    assert len(np.unique(expected.scales)) >= 126


# ---------------------------------------------------------------- every half


def layouts(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Every value as a block of its own, beside its neighbours, and beside strangers."""
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    yield values.reshape(-1, 1)
    yield values.reshape(-1, 32)
    yield values[shuffle].reshape(-1, 32)


HALF_OPTIONS = [
    Options(),
    Options("away"),
    Options("zero", nonfinite="element"),
    Options(nonfinite="element", flush="element"),
    Options("away", flush="block"),
]


@by_mx
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", RULES)
def test_every_half_under_powers_of_two(name: str, dtype: str, rule: str) -> None:
    fmt = oracle.with_rule(MX[name], rule)
    for x in layouts(all_halves(dtype)):
        for options in HALF_OPTIONS:
            expected = cast_rows(to_numpy(x), fmt, options)
            values = run(x, f"{name}-{rule}", options)
            assert values.dtype == x.dtype
            assert_same(values, round_output(expected.values, dtype), x)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("nonfinite", ["block", "element"])
def test_every_half_that_may_overflow(name: str, dtype: str, nonfinite: str) -> None:
    options = Options(overflow="nonfinite", nonfinite=nonfinite)
    for x in layouts(all_halves(dtype)):
        expected = cast_rows(to_numpy(x), MX[name], options)
        assert_same(run(x, name, options), round_output(expected.values, dtype), x)


REAL = [
    ("int8-token", oracle.real("int8", "token")),
    ("int4-token", oracle.real("int4", "token")),
    ("fp8_e4m3-token", oracle.real("e4m3", "token")),
    ("fp8_e5m2-token", oracle.real("e5m2", "token")),
    ("fp4_e2m1-32-e4m3", oracle.real("e2m1", 32, oracle.E4M3)),
    ("fp4_e2m1-32-ue5m3", oracle.real("e2m1", 32, oracle.UE5M3)),
    ("int8-32-bf16", oracle.real("int8", 32, oracle.BF16)),
]


@pytest.mark.parametrize(("name", "fmt"), REAL, ids=[name for name, _ in REAL])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_under_real_scales(name: str, fmt: Format, dtype: str) -> None:
    for x in layouts(all_halves(dtype)):
        for options in (Options(), Options("zero", nonfinite="element")):
            expected = cast_rows_real(to_numpy(x), fmt, options, compute="float32")
            assert_same(run(x, name, options), round_output(expected.values, dtype), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("nonfinite", ["block", "element"])
def test_every_half_under_two_levels(dtype: str, nonfinite: str) -> None:
    values = all_halves(dtype)
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    options = Options(nonfinite=nonfinite)
    for x in (values.reshape(-1, 16), values[shuffle].reshape(-1, 16)):
        expected = cast_two_level(to_numpy(x), oracle.NVFP4, options, compute="float32")
        assert_same(run(x, "nvfp4", options), round_output(expected.values, dtype), x)


# ---------------------------------------------------------------- around every power of two


def around_powers_of_two() -> torch.Tensor:
    """The float32 values within three steps of every power of two, subnormals included."""
    powers = torch.from_numpy(2.0 ** np.arange(-149, 128)).float()
    codes = powers.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    codes = torch.unique(codes[codes >= 0])
    values = codes.to(torch.int32).view(torch.float32)
    return torch.cat([values, -values])


@by_element
def test_float32_around_every_power_of_two(name: str) -> None:
    element, twin = every_element()[name]
    values = around_powers_of_two()
    alone, pairs = values.reshape(-1, 1), torch.stack([values, values.roll(3)], dim=1)
    for rule in RULES:
        fmt = BlockFormat(element, get_block_format("mxfp4").scale, 32, rule)  # type: ignore[arg-type]
        for x in (alone, pairs):
            for rounding in ROUNDINGS:
                options = Options(rounding)
                expected = cast_rows(to_numpy(x), Format(twin, oracle.E8M0, rule), options)
                values32 = round_output(expected.values, "float32")
                assert_same(run(x, fmt, options), values32, x)


@by_mx
def test_float64_around_every_power_of_two(name: str) -> None:
    powers = 2.0 ** np.arange(-1074, 1024)
    x = np.concatenate([np.nextafter(powers, 0), powers, np.nextafter(powers, np.inf)])
    x = np.concatenate([x, -x]).reshape(-1, 1)
    for rule in RULES:
        expected = cast_rows(x, oracle.with_rule(MX[name], rule), Options())
        assert_same(cast(torch.from_numpy(x), f"{name}-{rule}"), expected.values)


@by_mx
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("flush", ["element", "block"])
def test_flushing_around_every_power_of_two(name: str, rule: str, flush: str) -> None:
    values = around_powers_of_two()
    options = Options(flush=flush)
    fmt = oracle.with_rule(MX[name], rule)
    for x in (values.reshape(-1, 1), torch.stack([values, values.flip(0)], dim=1)):
        expected = cast_rows(to_numpy(x), fmt, options)
        assert_same(run(x, f"{name}-{rule}", options), round_output(expected.values, "float32"), x)


@pytest.mark.parametrize(("name", "fmt"), REAL, ids=[name for name, _ in REAL])
def test_real_scales_around_every_power_of_two(name: str, fmt: Format) -> None:
    values = around_powers_of_two()
    x = torch.stack([values, values * 0.3, values / -7], dim=1)
    for rounding in ROUNDINGS:
        options = Options(rounding)
        expected = cast_rows_real(to_numpy(x), fmt, options, compute="float32")
        assert_same(run(x, name, options), expected.values, x)


# ---------------------------------------------------------------- how many


def test_counts() -> None:
    twins = {name: twin for name, (_, twin) in every_element().items()}
    mx = {name: fmt.element for name, fmt in MX.items()}
    sums = {
        "fixed points": sum(
            len(numbers(twin)) * len(scale_exponents(name)) * len(ROUNDINGS)
            for name, twin in twins.items()
        )
        + sum(len(numbers(twin)) * (255 - twin.emax) for twin in mx.values()),
        "midpoints": sum(
            len(twin.magnitudes) * 6 * len(overflows(twin)) * len(MIDPOINT_SCALES) * len(ROUNDINGS)
            for twin in twins.values()
        ),
        "scales": sum(
            len(scale_rows(twin, dtype)) * len(RULES)
            for twin in mx.values()
            for dtype in ("float32", "float64")
        ),
        "halves": 2**16 * 2 * 3 * (6 * 4 * len(HALF_OPTIONS) + 2 * 2 + len(REAL) * 2),
        "powers of two": len(around_powers_of_two()) * 3 * len(RULES) * len(ROUNDINGS) * len(twins),
    }
    for name, count in sums.items():
        print(f"{name}: {count:,}")
    print(f"all: {sum(sums.values()):,}")
    assert len(twins) == 112
    assert sums == {
        "fixed points": 1_145_511,
        "midpoints": 718_272,
        "scales": 244_980,
        "halves": 54_263_808,
        "powers of two": 19_383_840,
    }
