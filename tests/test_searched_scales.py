"""The rules that search: `mse` and `four_over_six`, against trying every candidate exactly."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import ELEMENTS as FORMAT_ELEMENTS
from microscale.spelling import get_block_format
from microscale.tensor import quantize
from oracle import ELEMENTS, MX, shared_exponent
from oracle_numbers import DTYPES as BINARY
from oracle_numbers import Element, power, round_magnitude
from samples import same, sample

BLOCK = 16
EDGES = [
    [0.0] * BLOCK,
    [-0.0, 0.0] * (BLOCK // 2),
    [1.0] * BLOCK,
    [7.9] + [0.3] * (BLOCK - 1),
    [2.0**-149] * BLOCK,
    [3.4028234e38] + [1e38] * (BLOCK - 1),
    [2.0**-127] + [2.0**-130] * (BLOCK - 1),
    [6.0] + [0.24] * (BLOCK - 1),
]


def rows() -> torch.Tensor:
    """Blocks of many magnitudes, and some with ties and limits in them."""
    normal = sample((400, BLOCK), seed=5)
    close = torch.randn(400, BLOCK, generator=torch.Generator().manual_seed(6))
    return torch.cat([torch.tensor(EDGES), normal, close])


def nearest(value: float, scale: Fraction, element: Element) -> Fraction:
    """The decoded value, exactly, with its sign."""
    magnitude = round_magnitude(element, abs(Fraction(value)) / scale, "even")
    magnitude = element.largest if magnitude is None else magnitude
    return (magnitude if value >= 0 else -magnitude) * scale


def error(values: Sequence[float], decode: Callable[[float], float]) -> float:
    """Sum of squared errors in float64, first to last."""
    total = 0.0
    for value in values:
        difference = value - decode(value)
        total += difference * difference
    return total


def best_exponent(values: Sequence[float], element: Element) -> int:
    """Of the three exponents around floor's the smallest with the least error."""
    amax = max(abs(Fraction(v)) for v in values)
    if amax == 0:
        return -127
    floor = shared_exponent(amax, element, "floor")
    floor = min(max(floor, -127), 127)
    candidates = [min(max(floor + move, -127), 127) for move in (-1, 0, 1)]
    return min(
        candidates,
        key=lambda e: (error(values, lambda v: float(nearest(v, power(e), element))), e),
    )


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "e2m3", "e3m2", "int8", "int4"])
def test_mse_takes_the_best_of_three_exponents(name: str) -> None:
    fmt = f"{FORMAT_ELEMENTS[name]}-{BLOCK}-mse"
    x = rows()
    codes = quantize(x, fmt).scales[:, 0].tolist()
    for values, code in zip(x.tolist(), codes, strict=True):
        assert code - 127 == best_exponent(values, ELEMENTS[name]), values


def test_mse_moves_the_exponent_both_ways() -> None:
    small_matter = [4.0] + [0.25] * 31  # clipping 4 to 3 costs less than losing 31 quarters
    large_matter = [7.9] * 32  # floor clips all of them to 6
    x = torch.tensor([small_matter, large_matter, [1.0] * 32])
    moved = quantize(x, "mxfp4-mse").scales.int() - quantize(x, "mxfp4").scales.int()
    assert moved.flatten().tolist() == [-1, 1, 0]  # ones: exact twice, the smaller wins


@pytest.mark.parametrize("fmt", [*(f"{name}-mse" for name in MX), "e2m1-tensor-pow2-mse"])
@pytest.mark.parametrize("axis", [0, 1])
def test_mse_is_never_worse_than_floor(fmt: str, axis: int) -> None:
    x = sample((64, 70), torch.float64, seed=2)
    searched, floor = cast(x, fmt, axis), cast(x, fmt.removesuffix("-mse"), axis)
    assert (searched - x).square().sum() <= (floor - x).square().sum()
    same(quantize(x, fmt, axis).dequantize(), searched)


def two_scales(values: Sequence[float], outer: float) -> list[Fraction]:
    """The NVFP4 scales that take amax to 6 and to 4."""
    single, grid = BINARY["float32"], ELEMENTS["e4m3"]
    found = []
    for largest in (6, 4):
        first = single.round(max(abs(Fraction(v)) for v in values) / largest)
        assert first is not None
        second = single.round(first / Fraction(outer))
        assert second is not None
        rounded = round_magnitude(grid, second, "even")
        found.append(grid.largest if rounded is None else rounded)
    return found


def test_four_over_six_takes_the_better_of_two_scales() -> None:
    x = torch.randn(500, BLOCK, generator=torch.Generator().manual_seed(3))
    q = quantize(x, "nvfp4-four_over_six")
    assert q.tensor_scale.item() == quantize(x, "nvfp4").tensor_scale.item()
    chosen = q.scales[:, 0].view(torch.float8_e4m3fn).float().tolist()
    outer = q.tensor_scale.item()
    single = BINARY["float32"]
    taken = set()
    for values, scale in zip(x.tolist(), chosen, strict=True):

        def decode(value: float, block: Fraction) -> float:
            product = single.round(block * Fraction(outer))
            assert product is not None
            quotient = single.round(abs(Fraction(value)) / product)
            assert quotient is not None
            code = round_magnitude(ELEMENTS["e2m1"], quotient, "even") or Fraction(0)
            code = min(code, Fraction(6)) if quotient <= 6 else Fraction(6)
            decoded = single.round(code * block)
            assert decoded is not None
            decoded = single.round(decoded * Fraction(outer))
            assert decoded is not None
            return float(decoded) if value >= 0 else -float(decoded)

        six, four = two_scales(values, outer)
        errors = [error(values, lambda v, s=s: decode(v, s)) for s in (six, four)]  # type: ignore[misc]
        taken.add(errors[1] < errors[0])
        assert Fraction(scale) == (four if errors[1] < errors[0] else six)
    assert taken == {True, False}


@pytest.mark.parametrize("fmt", ["nvfp4-four_over_six", "e2m1-16-ue5m3-four_over_six"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_four_over_six_packs_what_it_casts(fmt: str, dtype: torch.dtype, axis: int) -> None:
    x = torch.randn(40, 50, dtype=torch.float64).to(dtype)
    same(quantize(x, fmt, axis).dequantize(), cast(x, fmt, axis))
    better = (cast(x, fmt, axis) - x).double().square().sum()
    assert better < (cast(x, fmt.removesuffix("-four_over_six"), axis) - x).double().square().sum()


@pytest.mark.parametrize("fmt", ["mxfp4-mse", "nvfp4-four_over_six", "mxfp8_e5m2-mse"])
@pytest.mark.parametrize("nonfinite", ["block", "element"])
def test_values_that_are_not_finite(fmt: str, nonfinite: str) -> None:
    x = torch.randn(4, 64)
    x[0, 3], x[1, 40], x[2, 5] = torch.nan, torch.inf, -torch.inf
    y = cast(x, fmt, nonfinite=nonfinite)
    assert y[0, 3].isnan()
    assert torch.equal(y[3], cast(x[3:], fmt)[0]) or "nvfp4" in fmt
    same(quantize(x, fmt, nonfinite=nonfinite).dequantize(), y)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("mxfp4-four_over_six", "does not apply to the scale format e8m0; use floor or ceil"),
        ("int8-channel-mse", "does not apply to the scale format fp32; use amax"),
        ("int8-channel-four_over_six", "values 6 and 4 of e2m1, not for int8"),
        ("e4m3-16-fp32-four_over_six", "not for e4m3"),
    ],
)
def test_rules_that_do_not_apply_are_refused(spelling: str, message: str) -> None:
    with pytest.raises(MicroscaleError, match=message):
        get_block_format(spelling)
