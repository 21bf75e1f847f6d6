"""gfloat (Graphcore) as referee: element grids, three roundings, and whole MX blocks."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from microscale.cast import cast
from microscale.formats import ElementFormat
from microscale.spelling import get_block_format, get_format
from microscale.tensor import quantize
from oracle_arrays import Floats, all_halves, bits, to_numpy
from referees.anchored import cast_elements, inputs

gfloat: Any = pytest.importorskip("gfloat")
infos: Any = pytest.importorskip("gfloat.formats")
block: Any = pytest.importorskip("gfloat.block")

ELEMENTS = {name: getattr(infos, f"format_info_ocp_{name}") for name in ("e4m3", "e5m2", "e2m3")}
ELEMENTS |= {name: getattr(infos, f"format_info_ocp_{name}") for name in ("e3m2", "e2m1", "int8")}
BLOCKS = {
    name: getattr(infos, f"format_info_{name if name != 'mxfp4' else 'mxfp4_e2m1'}")
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8")
}
ROUNDINGS = {
    "even": gfloat.RoundMode.TiesToEven,
    "away": gfloat.RoundMode.TiesToAway,
    "zero": gfloat.RoundMode.TowardZero,
}


def element(name: str) -> ElementFormat:
    found = get_format(name)
    assert isinstance(found, ElementFormat)
    return found


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_has_the_same_value(name: str) -> None:
    ours = element(name)
    theirs = [gfloat.decode_float(ELEMENTS[name], code).fval for code in range(2**ours.bits)]
    assert (bits(np.array(ours.values)) == bits(np.array(theirs))).all()


def test_every_scale_code_has_the_same_value() -> None:
    info = infos.format_info_ocp_e8m0
    for code in range(255):
        amax = gfloat.decode_float(info, code).fval * 4
        packed = quantize(torch.tensor([amax], dtype=torch.float64), "mxfp4")
        assert packed.scales.item() == code


@pytest.mark.parametrize("name", ELEMENTS)
def test_derived_properties_agree(name: str) -> None:
    ours, theirs = element(name), ELEMENTS[name]
    assert (ours.bits, ours.largest, ours.emax) == (theirs.k, theirs.max, theirs.emax)
    assert ours.smallest == theirs.smallest
    assert (ours.nan_code is None) == (theirs.num_nans == 0)
    assert ours.has_negative_zero == theirs.has_nz


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_half_rounds_to_the_same_value(name: str, rounding: str, dtype: torch.dtype) -> None:
    ours = element(name)
    x = inputs(ours, dtype)
    if name == "int8":  # see test_difference_int8_goes_down_to_minus_two
        x = x[x > -127.5 / 64]
    theirs = gfloat.round_ndarray(ELEMENTS[name], to_numpy(x), ROUNDINGS[rounding], sat=True)
    got = cast_elements(x, ours, rounding)
    wrong = np.flatnonzero(bits(got) != bits(np.asarray(theirs, np.float64) + 0 * got))
    assert len(wrong) == 0, [(float(x[i]), got[i], theirs[i]) for i in wrong[:5]]


def test_difference_int8_goes_down_to_minus_two() -> None:
    # OCP MX 5.3.4 lets the code of -2 be unused, to keep the grid symmetric; gfloat uses it.
    x = torch.tensor([-1.999, -127.5 / 64], dtype=torch.float64)
    theirs = gfloat.round_ndarray(ELEMENTS["int8"], x.numpy(), ROUNDINGS["even"], sat=True)
    assert theirs.tolist() == [-2.0, -2.0]
    assert cast_elements(x, element("int8")).tolist() == [-127 / 64, -127 / 64]


def theirs(name: str, row: npt.NDArray[Any], rounding: str = "even") -> Floats:
    return np.asarray(
        block.quantize_block(BLOCKS[name], row, block.compute_scale_amax, ROUNDINGS[rounding])
    )


def rows(count: int, seed: int) -> Floats:
    """Float32 values of wide and narrow range, with zeros and subnormals."""
    draw = np.random.default_rng(seed)
    values = draw.standard_normal((count, 32)) * 2.0 ** draw.integers(-6, 6, (count, 32))
    values *= 2.0 ** draw.integers(-100, 100, (count, 1))
    values[::5, ::3] = 0.0
    values[1] *= 2.0**-140
    return values.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_blocks_agree(name: str, rounding: str) -> None:
    data = rows(40, seed=1)
    if name == "mxint8":
        data = np.abs(data)  # see test_difference_int8_goes_down_to_minus_two
    values = to_numpy(cast(torch.from_numpy(data), name, rounding=rounding))
    for row, ours in zip(data, values, strict=True):
        assert (bits(theirs(name, row, rounding)) == bits(ours)).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_halves_agree(name: str) -> None:
    data = to_numpy(all_halves("float16")[: 31 * 1024 : 31]).reshape(-1, 32)
    data = np.abs(data)
    values = to_numpy(cast(torch.from_numpy(data), name))
    for row, ours in zip(data, values, strict=True):
        assert (bits(theirs(name, row)) == bits(ours)).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_zero_blocks_agree(name: str) -> None:
    signed = np.where(np.arange(32) % 2, 0.0, -0.0)
    ours = to_numpy(cast(torch.from_numpy(signed)[None], name))[0]
    assert (bits(theirs(name, signed)) == bits(ours)).all()
    assert quantize(torch.from_numpy(signed), name).scales.item() == 0


def test_difference_log2_is_wrong_just_below_powers_of_two() -> None:
    # gfloat takes floor(log2(amax)) in the type of the data; scales here come from the bits.
    wrong = []
    for exponent in range(-20, 20):
        amax = np.nextafter(np.float32(2.0**exponent), np.float32(0))
        row = np.full(32, amax, np.float32)
        ours = cast(torch.from_numpy(row), "mxfp4")[0].item()
        if theirs("mxfp4", row)[0] != ours:
            wrong.append(exponent)
        assert ours == 0.75 * 2.0**exponent  # the scale is 2^(k-3), the code that of 6
    assert len(wrong) >= 30


def test_difference_nan_and_infinity() -> None:
    # gfloat raises for NaN where the element has none, and takes the largest scale for infinity;
    # here either makes the block NaN.
    fmt = get_block_format("mxfp4")
    nan, infinite = np.ones(32), np.ones(32)
    nan[3], infinite[3] = np.nan, np.inf
    with pytest.raises(ValueError, match="No NaN in format"):
        theirs("mxfp4", nan)
    assert theirs("mxfp4", infinite)[3] == 6 * 2.0**127
    for row in (nan, infinite):
        assert cast(torch.from_numpy(row), fmt).isnan().all()
