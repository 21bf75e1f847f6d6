"""Steps of the reference kernel whose ranges no whole cast walks through to the end."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

import oracle
from microscale.formats import E2M1, E4M3, INT8, POW2, ElementFormat, float_format
from microscale.kernels import reference
from microscale.rounding import Rounding
from oracle_arrays import TORCH, Floats, assert_same, to_numpy
from oracle_numbers import DTYPES, round_to


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.float32, -149), (torch.float64, -1022)])
def test_powers_of_two_for_every_exponent(dtype: torch.dtype, lowest: int) -> None:
    highest = 127 if dtype is torch.float32 else 1023
    exponents = torch.arange(lowest, highest + 1, dtype=torch.int32)
    expected = np.array([math.ldexp(1.0, e) for e in exponents.tolist()])
    assert_same(reference.power_of_two(exponents, dtype), expected)


def test_rounding_to_integers_beside_every_half() -> None:
    halves = torch.arange(0, 64) + 0.5
    below, above = (torch.nextafter(halves, torch.tensor(end)) for end in (0.0, math.inf))
    x = torch.cat([below, halves, above, torch.tensor([0.49999997, 8388607.5, 8388608.0])])
    x = torch.cat([x, -x])
    laws: dict[Rounding, Callable[[Floats], Floats]] = {
        Rounding.EVEN: np.rint,
        Rounding.ZERO: np.trunc,
        # In float64 the sum is exact.
        Rounding.AWAY: lambda v: np.copysign(np.floor(np.abs(v) + 0.5), v),
    }
    for rounding, law in laws.items():
        assert_same(reference.round_to_integer(x, rounding), law(to_numpy(x)), x)


@pytest.mark.parametrize("element", [E2M1, E4M3, float_format(7, 0), INT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spacing_of_the_grid_is_the_distance_to_the_next_value(
    element: ElementFormat, dtype: torch.dtype
) -> None:
    values = sorted({v for v in element.values if 0 <= v <= element.largest})
    for low, high in pairwise(values):
        spacing = reference.grid_spacing(torch.tensor([low], dtype=dtype), element)
        assert float(spacing) == high - low


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrowing_float64_rounds_once(dtype: str) -> None:
    draw = random.Random(0)
    binary = DTYPES[dtype]
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, 2.0**-1074, 2.0**-150]
    for _ in range(4000):
        # A value of half the type's spacing (often a midpoint), and what lies close beside it.
        exponent = draw.randrange(-152, 129)
        mantissa = draw.randrange(2**binary.precision, 2 ** (binary.precision + 1))
        value = math.ldexp(mantissa, exponent - binary.precision)
        step = draw.choice([-1, 0, 1]) * 2.0 ** -draw.randrange(20, 52)
        values.append(draw.choice([-1, 1]) * value * (1 + step))
    expected = np.array([round_to(value, dtype) for value in values])
    x = torch.tensor(values, dtype=torch.float64)
    assert_same(reference.narrow(x, TORCH[dtype]), expected, x)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("length", [0, 1, 3, 8, 33])
def test_streams_of_every_width(bits: int, length: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (3, length), generator=generator).to(torch.uint8)
    packed = reference.pack(codes, bits, 5)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        assert bytes(stored) == oracle.pack_row(row, bits, 5)
    assert torch.equal(reference.unpack(packed, bits, length), codes)


def test_every_stored_exponent_without_a_bound_decodes() -> None:
    stored = torch.arange(-1022, 1023, dtype=torch.int32).to(torch.int16)
    values = reference.decode_scale(stored, POW2, torch.float64)
    assert_same(values, np.ldexp(1.0, stored.numpy().astype(np.int64)))
    assert torch.equal(reference.encode_scale(values, POW2), stored)
    nan = torch.tensor([math.nan], dtype=torch.float64)
    assert reference.encode_scale(nan, POW2).tolist() == [-(2**15)]
    assert reference.decode_scale(reference.encode_scale(nan, POW2), POW2, torch.float64).isnan()
