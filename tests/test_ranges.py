"""Ranges: every estimator against brute force over the same values."""

import numpy as np
import pytest
import torch
from torch import Tensor

from microscale import ranges
from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.operands import Operand
from microscale.ranges import CANDIDATES, Sample, percentile, quantize_ranged
from microscale.spelling import get_block_format

WEIGHT_FORMATS = (
    "int8-tensor",
    "int8-channel",
    "int4-token",
    "int4-channel-zero_point",
    "int8-16-fp32",
    "int3-8-zero_point",
    "fp8_e2m5fnuz-channel",
    "fp8_e3m4fnuz-tensor",
    "fp8_e4m3fnuz-channel",
    "fp8_e5m2fnuz-token",
    "fp8_e4m3fnuz-tensor-pow2",
    "int4-4x8-fp32",
)
TENSOR_FORMATS = (
    "int8-tensor",
    "int4-tensor-zero_point",
    "fp8_e2m5fnuz-tensor",
    "fp8_e4m3fnuz-tensor",
    "fp8_e5m2fnuz-tensor",
    "fp8_e4m3fnuz-tensor-pow2",
)


def heavy(*shape: int, seed: int = 0) -> Tensor:
    """Values with outliers, not symmetric."""
    x = np.random.default_rng(seed).standard_t(3, shape)
    return torch.tensor(np.where(x < 0, x / 3, x), dtype=torch.float32)


def settled(low: float, high: float, fmt: str) -> str:
    """A format whose scale covers a range, found by casting tensors of these two values."""
    sample = Sample()
    sample.add(torch.tensor([low, high]))
    return str(sample.settle(get_block_format(fmt), "minmax"))


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_minmax_is_the_cast(fmt: str) -> None:
    x = heavy(12, 40)
    packed = quantize_ranged(x, Operand(get_block_format(fmt)), -1, "minmax")
    assert torch.equal(packed.dequantize(), cast(x, fmt))


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_mse_is_the_best_of_all_candidates(fmt: str) -> None:
    """For every block alone: a search over values that were scaled before they are cast."""
    x = heavy(8, 32)
    ours = quantize_ranged(x, Operand(get_block_format(fmt)), -1, "mse").dequantize()
    assert ours.shape == x.shape
    parsed = get_block_format(fmt)
    whole = fmt.replace(str(parsed.block), "tensor", 1) if isinstance(parsed.block, int) else fmt
    for rows, mine in zip(pieces(x, parsed.block), pieces(ours, parsed.block), strict=True):
        one = str(get_block_format(whole.replace("channel", "tensor").replace("token", "tensor")))
        if isinstance(parsed.block, tuple):
            one = "int4-tensor"
        low, high = rows.min(), rows.max()
        tried = [settled(float(low * f), float(high * f), one) for f in CANDIDATES]
        errors = [float((rows - cast(rows, at)).double().square().sum()) for at in tried]
        found = float((rows - mine).double().square().sum())
        assert found == pytest.approx(min(errors), rel=1e-5)


def pieces(x: Tensor, block: object) -> list[Tensor]:
    """The blocks of a matrix along its last dimension."""
    if isinstance(block, int):
        return list(x.reshape(-1, block))
    if isinstance(block, tuple):
        return [t for rows in x.split(block[0], 0) for t in rows.split(block[1], 1)]
    return [x] if block == "tensor" else list(x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("fmt", ["int4-channel", "int4-token", "int4-8-fp32"])
def test_any_axis(fmt: str, axis: int) -> None:
    x = heavy(6, 16, 8)
    moved = x.movedim(axis, -1) if fmt != "int4-channel" else x
    ours = quantize_ranged(x, Operand(get_block_format(fmt)), axis, "mse").dequantize()
    if fmt == "int4-channel":
        kept = 2 if axis == 0 else 0
        apart = [
            quantize_ranged(part, Operand(get_block_format("int4-tensor")), -1, "mse").dequantize()
            for part in x.unbind(kept)
        ]
        assert torch.equal(ours, torch.stack(apart, kept))
    else:
        last = quantize_ranged(moved, Operand(get_block_format(fmt)), -1, "mse").dequantize()
        assert torch.equal(ours.movedim(axis, -1), last)


def test_mse_beats_minmax_where_there_are_outliers() -> None:
    x = heavy(4, 4096)
    operand = Operand(get_block_format("int4-channel"))
    errors = [
        float((x - quantize_ranged(x, operand, -1, e).dequantize()).square().sum())
        for e in ("mse", "minmax")
    ]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("count", [1, 7, 9999, 10_000, 20_001])
def test_percentile_by_counting(count: int) -> None:
    x = heavy(1, count)
    low, high = percentile(x)
    below = [v for v in x[0].tolist() if (x <= v).sum() > 1e-4 * count]
    above = [v for v in x[0].tolist() if (x >= v).sum() > 1e-4 * count]
    assert float(low) == min(below)
    assert float(high) == max(above)


def test_percentile_of_weighted_values() -> None:
    x, weights = heavy(2, 50), torch.randint(1, 400, (50,))
    repeated = x.repeat_interleave(weights, 1)
    for ours, theirs in zip(percentile(x, weights), percentile(repeated), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fmt", TENSOR_FORMATS)
def test_batches_settle_minmax(fmt: str) -> None:
    batches = [heavy(5, 8, seed=i) for i in range(4)]
    sample = gathered(batches)
    assert str(sample.settle(get_block_format(fmt), "minmax")) == settled(
        float(torch.stack(batches).min()), float(torch.stack(batches).max()), fmt
    )
    whole = torch.cat(batches)
    found = sample.settle(get_block_format(fmt), "minmax")
    assert torch.equal(cast(whole, found), cast(whole, fmt))


def test_running_minmax() -> None:
    batches = [heavy(5, 8, seed=i) for i in range(4)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * float(batch.min()), 0.9 * high + 0.1 * float(batch.max())
    assert gathered(batches).running == pytest.approx((low, high))
    found = gathered(batches).settle(get_block_format("int8-tensor"), "running").scale.value
    assert found == pytest.approx(max(-low, high) * 64 / 127)


@pytest.mark.parametrize("fmt", TENSOR_FORMATS)
def test_batches_settle_mse(fmt: str) -> None:
    batches = [heavy(50, 8, seed=i) for i in range(4)]
    whole = torch.cat(batches)
    errors: dict[str, float] = {}
    for fraction in CANDIDATES:
        one = settled(float(whole.min() * fraction), float(whole.max() * fraction), fmt)
        errors.setdefault(one, float((whole - cast(whole, one)).double().square().sum()))
    found = str(gathered(batches).settle(get_block_format(fmt), "mse"))
    assert errors[found] == pytest.approx(min(errors.values()), rel=1e-6)


def gathered(batches: list[Tensor]) -> Sample:
    """A sample of all of them."""
    sample = Sample()
    for batch in batches:
        sample.add(batch)
    return sample


def test_sample_keeps_extremes_and_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "EXTREME", 64)
    monkeypatch.setattr(ranges, "KEPT", 2048)
    batches = [heavy(500, 20, seed=i) for i in range(6)]
    whole, sample = torch.cat(batches).flatten(), gathered(batches)
    assert sample.count == len(whole)
    assert (len(sample.values), float(sample.weights.sum())) == (64 + 2048, len(whole))
    largest = whole.abs().sort(descending=True).values[:64]
    assert torch.equal(sample.values[:64].abs(), largest)
    # Within five standard errors of the drawn part.
    mean = float((sample.values * sample.weights).sum() / len(whole))
    assert mean == pytest.approx(float(whole.mean()), abs=5 * float(whole.std()) / 2048**0.5)
    assert torch.equal(sample.values, gathered(batches).values)


def test_zeros_have_a_range() -> None:
    sample = gathered([torch.zeros(5)])
    for estimator in ("minmax", "running", "percentile", "mse"):
        assert str(sample.settle(get_block_format("int8-tensor"), estimator)).endswith("at1")


@pytest.mark.parametrize("fmt", ["nvfp4", "int8-tensor-unit", "int8-tensor-at0.5"])
def test_formats_without_ranges_are_refused(fmt: str) -> None:
    with pytest.raises(MicroscaleError, match="no range to estimate"):
        quantize_ranged(torch.ones(4, 4), Operand(get_block_format(fmt)), -1, "mse")


def test_refusals() -> None:
    int8 = get_block_format("int8-tensor")
    with pytest.raises(MicroscaleError, match="no values"):
        Sample().settle(int8, "mse")
    with pytest.raises(MicroscaleError, match="1 of 2 values are NaN"):
        gathered([torch.tensor([1.0, torch.nan])])
    with pytest.raises(MicroscaleError, match="more than one scale"):
        gathered([torch.ones(3)]).settle(get_block_format("int8-token"), "mse")
    with pytest.raises(MicroscaleError, match="estimator='mean' is not known"):
        quantize_ranged(torch.ones(4), Operand(int8), -1, "mean")
    with pytest.raises(MicroscaleError, match="1 values that are NaN"):
        quantize_ranged(torch.tensor([torch.inf, 1]), Operand(int8), -1, "mse")
