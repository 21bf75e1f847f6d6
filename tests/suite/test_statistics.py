"""Estimates against scipy, against simulation, and against the delta method written out."""

import math

import pytest
import torch
from scipy import stats

from microscale.errors import MicroscaleError
from microscale.suite import statistics
from microscale.suite.statistics import Estimate, Verdict


def sample(seed: int, n: int = 40) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_is_scipys_with_equal_weights() -> None:
    values = sample(0)
    found = statistics.mean(values, torch.full_like(values, 3.0))
    low, high = stats.t.interval(0.95, 39, loc=values.mean().item(), scale=stats.sem(values))
    assert found.value == pytest.approx(values.mean().item(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(values), rel=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.units == 40


def test_difference_is_scipys_paired_interval() -> None:
    first, second = sample(1), sample(2) + 0.3
    found = statistics.difference(first, second, torch.ones(40, dtype=torch.float64))
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_weighted_mean_is_the_mean_over_positions() -> None:
    values, weight = sample(3, 4), torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    every = torch.repeat_interleave(values, weight.long())
    assert statistics.mean(values, weight).value == pytest.approx(every.mean().item(), rel=1e-12)


def test_weighted_error_covers_what_it_says() -> None:
    # Units whose weight is bound to their value: the error of a ratio, not of a mean of values.
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        values = torch.rand(60, generator=generator, dtype=torch.float64)
        weight = 1 + (9 * values).floor()
        found = statistics.mean(values, weight)
        # E[w x] / E[w] for x uniform and w = 1 + floor(9 x).
        truth = sum((1 + k) * (2 * k + 1) / 162 for k in range(9)) / 5
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_perplexity_by_the_delta_method() -> None:
    loss, weight = sample(4) * 0.1 + 2, torch.ones(40, dtype=torch.float64)
    plain, found = statistics.mean(loss, weight), statistics.perplexity(loss, weight)
    assert found.value == pytest.approx(math.exp(plain.value))
    assert found.error == pytest.approx(math.exp(plain.value) * plain.error)


def test_perplexity_difference_is_paired() -> None:
    base, weight = sample(5) * 0.3 + 2, torch.ones(40, dtype=torch.float64)
    loss = base + 0.01
    found = statistics.perplexity_difference(loss, base, weight)
    first, second = statistics.perplexity(loss, weight), statistics.perplexity(base, weight)
    assert found.value == pytest.approx(first.value - second.value, rel=1e-9)
    assert found.error < 0.05 * first.error


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    found = statistics.perplexity(torch.tensor([1e4, 1e4], dtype=torch.float64), torch.ones(2))
    assert found.value == math.inf
    assert found.to_dict() == {"value": None, "error": None, "low": None, "high": None, "units": 2}


def test_one_unit_and_nan_have_no_interval() -> None:
    for values in (torch.tensor([1.5]), torch.tensor([1.0, math.nan])):
        found = statistics.mean(values.double(), torch.ones(len(values)).double())
        assert math.isnan(found.error)
        assert (found.low, found.high) == (-math.inf, math.inf)


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(MicroscaleError, match="every target is ignored"):
        statistics.mean(torch.zeros(3), torch.zeros(3))


def interval(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, 1.0, low, high, 10)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.2, Verdict.HOLDS),
        (-0.2, -0.1, Verdict.FAILS),
        (-0.1, 0.2, Verdict.OPEN),
        (0.0, 0.0, Verdict.OPEN),
        (-math.inf, math.inf, Verdict.OPEN),
    ],
)
def test_sign(low: float, high: float, verdict: Verdict) -> None:
    assert statistics.sign(interval(low, high)) is verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.9, 0.9, Verdict.HOLDS),
        (0.0, 0.0, Verdict.HOLDS),
        (0.5, 0.9, Verdict.HOLDS),
        (1.1, 1.2, Verdict.FAILS),
        (-1.2, -1.1, Verdict.FAILS),
        (0.9, 1.1, Verdict.OPEN),
        (-2.0, 2.0, Verdict.OPEN),
    ],
)
def test_equivalence(low: float, high: float, verdict: Verdict) -> None:
    assert statistics.equivalence(interval(low, high), 1.0) is verdict


def test_verdicts_are_these_words() -> None:
    assert [str(verdict) for verdict in Verdict] == [
        "holds",
        "does not hold",
        "not distinguishable",
        "not tested",
    ]
