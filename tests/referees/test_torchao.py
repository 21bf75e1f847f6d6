"""torchao's MX and NVFP4 casts as referee: scale bytes and packed codes, byte for byte.

Not in the development group: `pip install --no-deps torchao` to run it.
"""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import oracle
from microscale.cast import cast
from microscale.tensor import BlockTensor, quantize
from oracle_arrays import to_numpy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao")
    mx: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv: Any = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    config: Any = pytest.importorskip("torchao.prototype.mx_formats.config")

DTYPES: dict[str, Any] = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}
RULES = ("floor", "ceil", "even", "rceil")

by_name = pytest.mark.parametrize("name", DTYPES)
by_rule = pytest.mark.parametrize("rule", RULES)


def theirs(x: torch.Tensor, name: str, rule: str) -> tuple[list[int], list[list[int]]]:
    """Scale bytes and rows of codes."""
    mode = getattr(config.ScaleCalculationMode, rule.upper())
    scales, data = mx.to_mx(x.contiguous(), DTYPES[name], 32, mode)
    return scales.view(torch.uint8).flatten().tolist(), data.view(torch.uint8).tolist()


def ours(x: torch.Tensor, name: str, rule: str) -> tuple[list[int], list[list[int]]]:
    """The same in their layout: 4-bit codes packed, 6-bit codes one a byte."""
    packed = quantize(x, f"{name}-{rule}")
    rows = packed.codes.tolist()
    if packed.format.element.bits == 6:
        rows = [oracle.unpack(bytes(row), 6, x.shape[1]) for row in rows]
    return packed.scales.flatten().tolist(), rows


def sample(rows: int, dtype: torch.dtype, seed: int = 0, low: int = -100) -> torch.Tensor:
    """Blocks of all magnitudes but those of `test_difference_the_smallest_scale...`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, 96), generator=generator)
    x *= torch.exp2(torch.randint(-5, 6, x.shape, generator=generator).float())
    x *= torch.exp2(torch.randint(low, 100, (rows, 1), generator=generator).float())
    x[::7, ::3] = 0.0
    x[3] = -0.0
    return x.to(dtype)


@by_name
@by_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_bytes_and_codes_agree(name: str, rule: str, dtype: torch.dtype) -> None:
    x = sample(400, dtype)
    if rule == "rceil":
        x = torch.where(x == 0, 1.0, x)  # see test_difference_rceil...
    assert ours(x, name, rule) == theirs(x, name, rule)


@by_name
@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_blocks_around_every_power_of_two_agree(name: str, rule: str) -> None:
    emax = oracle.MX[name].element.emax
    powers = torch.exp2(torch.arange(-126 + emax + 1, 127, dtype=torch.float64)).float()
    codes = powers.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    amax = codes.flatten().view(torch.float32)
    x = amax[:, None] * torch.linspace(1.0, -1.0, 32)
    if rule == "ceil":
        x = x[:-7]  # 2^(128 - emax): in range for both, but the block may reach infinity
    assert ours(x, name, rule) == theirs(x, name, rule)


@by_name
def test_every_finite_bfloat16_agrees(name: str) -> None:
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = codes.view(torch.bfloat16).reshape(-1, 32)
    emax = oracle.MX[name].element.emax
    amax = x.float().abs().amax(1)
    x = x[(amax >= 2.0 ** (emax - 126)) & (amax < 2.0**127)]
    for rule in ("floor", "ceil", "even"):
        assert ours(x, name, rule) == theirs(x, name, rule)


@by_name
@by_rule
def test_zero_blocks_and_nan_blocks_agree(name: str, rule: str) -> None:
    zeros, nan = torch.zeros(1, 32), torch.full((1, 32), torch.nan)
    assert ours(zeros, name, rule) == theirs(zeros, name, rule)
    assert ours(nan, name, rule)[0] == theirs(nan, name, rule)[0] == [255]


@by_name
def test_difference_infinite_blocks_get_a_finite_scale_there(name: str) -> None:
    x = torch.ones(1, 32)
    x[0, 0] = torch.inf
    for rule in RULES:
        # Infinity has exponent 128; RCEIL gives it the largest scale. Here the block is NaN.
        finite = 254 if rule == "rceil" else 127 + 128 - oracle.MX[name].element.emax
        assert theirs(x, name, rule)[0] == [finite]
        assert ours(x, name, rule)[0] == [255]


@by_name
@by_rule
@pytest.mark.parametrize("amax", [3.0e38, 3.3e38, 3.4e38])
def test_scales_at_the_top_of_float32_agree(name: str, rule: str, amax: float) -> None:
    x = torch.full((1, 32), amax)
    assert ours(x, name, rule)[0] == theirs(x, name, rule)[0]


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_difference_the_smallest_scale_divides_by_2_to_minus_126_there(rule: str) -> None:
    # They store the byte 0 (2^-127) but divide by the smallest normal float32, so codes halve.
    x = torch.full((1, 32), 4.0 * 2.0**-127)
    scales, codes = theirs(x, "mxfp4", rule)
    assert (scales, codes[0][0]) == ([0], 0x44)  # the code of 2
    scales, codes = ours(x, "mxfp4", rule)
    assert (scales, codes[0][0]) == ([0], 0x66)  # the code of 4
    assert torch.equal(cast(x, f"mxfp4-{rule}"), x)


def test_difference_rceil_divides_by_one_at_the_smallest_scale_there() -> None:
    x = torch.full((1, 32), 6.0 * 2.0**-127)
    scales, codes = theirs(x, "mxfp4", "rceil")
    assert (scales, codes[0][0]) == ([0], 0x00)
    assert ours(x, "mxfp4", "rceil") == ([0], [[0x77] * 16])


def test_difference_rceil_takes_log2_there() -> None:
    # One float32 above 6 x 2^k needs the next scale; log2 of the quotient rounds down to k.
    amax = torch.nextafter(6.0 * torch.exp2(torch.arange(-100.0, 100.0)), torch.tensor(torch.inf))
    x = amax[:, None].expand(-1, 32).contiguous()
    exact = (torch.arange(-100, 100) + 1 + 127).tolist()
    assert ours(x, "mxfp4", "rceil")[0] == exact
    found = theirs(x, "mxfp4", "rceil")[0]
    assert sum(a != b for a, b in zip(found, exact, strict=True)) > 190


def nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outer = nv.per_tensor_amax_to_scale(x.abs().max())
    scales, codes = nv.nvfp4_quantize(x, 16, outer)
    return outer, scales.view(torch.uint8), codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_agrees_but_for_quotients_beside_a_tie(dtype: torch.dtype) -> None:
    x = (torch.randn((300, 96), generator=torch.Generator().manual_seed(3)) * 3).to(dtype)
    packed = quantize(x, "nvfp4")
    outer, scales, codes = nvfp4(x)
    assert packed.tensor_scale.item() == outer.item()
    assert torch.equal(packed.scales, scales.reshape(packed.scales.shape))
    # They multiply by a float32 reciprocal of the scales instead of dividing by their product:
    # a few quotients in ten thousand fall on the other side of a midpoint.
    theirs_values = _decoded(codes.reshape(packed.codes.shape))
    ours_values = _decoded(packed.codes)
    differ = theirs_values != ours_values
    assert differ.float().mean() < 1e-3
    quotient = x.double() / _scales(packed).repeat_interleave(16, dim=1)
    beside = (quotient - (ours_values + theirs_values) / 2).abs()[differ]
    assert bool((beside < 1e-5).all())


def _decoded(codes: torch.Tensor) -> torch.Tensor:
    rows = [oracle.unpack(bytes(row), 4, 2 * len(row)) for row in codes.tolist()]
    table = torch.tensor(oracle.ELEMENTS["e2m1"].values, dtype=torch.float64)
    return table[torch.tensor(rows)]


def _scales(packed: BlockTensor) -> torch.Tensor:
    table = torch.tensor(oracle.ELEMENTS["e4m3"].values, dtype=torch.float64)
    return table[packed.scales.long()] * packed.tensor_scale.double()


def test_difference_nvfp4_scales_start_at_the_smallest_normal_there() -> None:
    # They clamp block scales to 2^-6 from below; here E4M3 subnormals are used, and 0 kept.
    x = torch.ones(1, 48) * 2688.0
    x[0, 16:32] = 6 * 2.0**-8
    x[0, 32:] = 6 * 2.0**-12
    assert nvfp4(x)[1].flatten().tolist() == [0x7E, 0x08, 0x08]
    assert quantize(x, "nvfp4").scales.flatten().tolist() == [0x7E, 0x02, 0x00]
    assert to_numpy(cast(x, "nvfp4"))[0, 16:].tolist() == [6 * 2.0**-8] * 16 + [0.0] * 16


def test_difference_nvfp4_zero_blocks() -> None:
    x = torch.zeros(1, 32)
    x[0, 0] = 2688.0
    assert nvfp4(x)[1].flatten().tolist() == [0x7E, 0x08]
    assert quantize(x, "nvfp4").scales.flatten().tolist() == [0x7E, 0x38]
    assert np.all(to_numpy(cast(x, "nvfp4"))[0, 1:] == 0)
