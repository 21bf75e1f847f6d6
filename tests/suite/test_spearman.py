"""Spearman's correlation and its standard errors, against SciPy, the jackknife and resampling."""

import math

import pytest
import torch
from torch import Tensor

from microscale.suite.spearman import influences
from microscale.suite.statistics import mean


def correlated(n: int, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, x + noise * torch.randn(n, generator=generator, dtype=torch.float64)


def spearman(x: Tensor, y: Tensor) -> float:
    stats = pytest.importorskip("scipy.stats")
    return float(stats.spearmanr(x.numpy(), y.numpy()).statistic)


@pytest.mark.parametrize("n", [3, 10, 101])
@pytest.mark.parametrize("ties", [False, True])
def test_the_mean_is_the_correlation(n: int, ties: bool) -> None:
    x, y = correlated(n)
    if ties:
        y = (2 * y).round()
    assert float(influences(x, y).mean()) == pytest.approx(spearman(x, y), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_errors_are_those_of_leaving_one_out(ties: bool) -> None:
    x, y = correlated(300)
    if ties:
        y = y.round()
    found = mean(influences(x, y), torch.ones(300)).error
    others = [torch.arange(300) != i for i in range(300)]
    left_out = torch.tensor([spearman(x[keep], y[keep]) for keep in others])
    jackknife = float(((left_out - left_out.mean()) ** 2).sum() * 299 / 300) ** 0.5
    assert found == pytest.approx(jackknife, rel=0.03)


def test_intervals_cover_what_repetition_finds() -> None:
    found = [influences(*correlated(80, seed=seed)) for seed in range(200)]
    estimates = [mean(values, torch.ones(80)) for values in found]
    spread = float(torch.tensor([e.value for e in estimates]).std())
    assert sum(e.error for e in estimates) / 200 == pytest.approx(spread, rel=0.15)


def test_paired_differences_are_of_the_difference() -> None:
    x, y = correlated(200)
    near = x + 0.01 * correlated(200, seed=7)[1]
    first, second = influences(x, y), influences(near, y)
    paired = mean(second - first, torch.ones(200))
    assert paired.value == pytest.approx(spearman(near, y) - spearman(x, y), abs=1e-12)
    assert paired.error < 0.1 * mean(first, torch.ones(200)).error


def test_a_perfect_order_has_no_error() -> None:
    x, _ = correlated(50)
    values = influences(x, x.exp())
    torch.testing.assert_close(values, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_what_has_no_order_has_no_correlation(bad: float) -> None:
    x, y = correlated(5)
    assert influences(torch.full_like(x, bad), y).isnan().all()
