"""The figures of operands, against their definitions on values that can be held at once."""

import math

import pytest
import torch
from torch import Tensor

from microscale.cast import cast
from microscale.operands import Operand
from microscale.spelling import get_block_format
from microscale.tally import Figures, Tally
from microscale.tensor import quantize

FORMATS = ("mxfp4", "mxfp6_e2m3", "mxint8", "nvfp4", "int8-tensor", "int8-token", "mxfp4-rceil")


def values(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x * torch.linspace(0.01, 3, shape[-1])


def tallied(x: Tensor, fmt: str, axis: int = -1) -> Figures:
    tally = Tally(Operand(get_block_format(fmt)))
    tally.add(x, axis)
    return tally.figures()


@pytest.mark.parametrize("fmt", FORMATS)
def test_figures_are_what_their_definitions_say(fmt: str) -> None:
    x = values(6, 70)
    q, found = cast(x, fmt).double(), tallied(x, fmt)
    wide = x.double()
    error = (wide - q).square().sum()
    assert found.sqnr == pytest.approx(float(10 * torch.log10(wide.square().sum() / error)))
    assert found.flushed == pytest.approx(float(((q == 0) & (x != 0)).double().mean()))
    assert found.values == x.numel()
    assert found.nonfinite == 0
    rms = wide.square().mean().sqrt()
    assert found.crest == pytest.approx(float(wide.abs().max() / rms))
    centered = wide - wide.mean()
    moment = (centered**4).mean() / centered.square().mean() ** 2
    assert found.kurtosis == pytest.approx(float(moment))


def test_saturated_values_are_beyond_the_largest_element() -> None:
    x = torch.ones(1, 32)
    x[0, :3] = torch.tensor([7.9, 6.1, 6.0])  # the scale is 1, the largest element 6
    assert tallied(x, "mxfp4").saturated == 2 / 32
    assert tallied(x, "mxfp4-rceil").saturated == 0


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int8-channel"])
def test_scales_are_counted_by_exponent(fmt: str) -> None:
    x = values(6, 96)
    x[2] = 0  # blocks of zeros have no scale to speak of
    found, stored = tallied(x, fmt), quantize(x, fmt)
    scales = stored.scales.double()
    if fmt == "mxfp4":
        scales = torch.exp2(scales - 127)
    elif fmt == "nvfp4":
        scales = stored.scales.view(torch.float8_e4m3fn).double() * stored.tensor_scale.double()
    alive = scales[[0, 1, 3, 4, 5]].log2().floor().int().flatten().tolist()
    assert dict(found.scales) == {e: alive.count(e) for e in alive}


def test_the_crest_factor_of_blocks_counts_no_padding() -> None:
    x = torch.full((1, 48), 2.0)
    x[0, 0] = 4.0
    first = 4 / math.sqrt((16 + 31 * 4) / 32)
    assert tallied(x, "mxfp4").block_crest == pytest.approx((first + 1) / 2)


def test_outlier_channels() -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 30
    x[:, 9] *= 10
    x[:, 11] *= 3
    found = tallied(x, "mxfp4")
    assert [channel for channel, _ in found.outliers] == [5, 9]
    assert found.outliers[0][1] == pytest.approx(30, rel=0.2)
    assert found.channels == 64
    assert tallied(x, "mxfp4", 0).outliers == ()
    assert dict(tallied(x.T, "mxfp4", 0).outliers) == pytest.approx(dict(found.outliers))


def test_parts_add_up() -> None:
    x = values(8, 64)
    tally = Tally(Operand(get_block_format("mxfp6_e3m2")))
    for part in x.split(2):
        tally.add(part, -1)
    whole, parts = tallied(x, "mxfp6_e3m2"), tally.figures()
    assert parts.scales == whole.scales
    for name in ("sqnr", "saturated", "flushed", "crest", "block_crest", "kurtosis"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name))


def test_channels_that_change_are_not_compared() -> None:
    tally = Tally(Operand(get_block_format("mxfp4")))
    tally.add(values(4, 32), -1)
    tally.add(values(4, 64), -1)
    assert tally.figures().channels is None
    assert tally.figures().outliers == ()


def test_what_is_not_finite_is_counted_apart() -> None:
    x = values(2, 64)
    x[0, 3] = math.nan
    x[1, 40] = math.inf
    found = tallied(x, "mxfp4")
    assert found.nonfinite == 64  # the two blocks, whose casts are NaN
    assert found.values == 64
    assert math.isfinite(found.sqnr)


@pytest.mark.parametrize("x", [torch.zeros(2, 32), torch.empty(0, 32)])
def test_nothing_to_see_is_no_number(x: Tensor) -> None:
    found = tallied(x, "mxfp4")
    assert math.isnan(found.sqnr)
    assert math.isnan(found.crest)
    assert math.isnan(found.kurtosis)
    assert found.scales == ()
    assert found.to_dict()["sqnr"] is None


def test_what_loses_nothing_is_exact() -> None:
    found = tallied(torch.full((1, 32), 2.0), "mxfp4")
    assert found.sqnr == math.inf
    assert math.isnan(found.kurtosis)
    assert found.crest == 1
