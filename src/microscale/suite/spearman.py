"""Spearman's rank correlation as a mean over units, so that its errors are those of any mean.

With F and G the distribution functions of the sample at mid-ranks, A = F(x) - 1/2, B = G(y) - 1/2,
the correlation is rho = C / sqrt(V W) for C = E[A B], V = E[A^2], W = E[B^2]. A unit's value here
is rho plus the influence of that unit on it, as a functional of the sample. The influences add up
to zero, so the mean of the values is rho, and the standard error of that mean is that of the
infinitesimal jackknife (Efron, The Jackknife, the Bootstrap and Other Resampling Plans, 1982, ch.
6). Two correlations over the same units are compared by the paired differences of their values.
"""

import math

import torch
from torch import Tensor

CORRELATION = "Spearman correlation"


def influences(x: Tensor, y: Tensor) -> Tensor:
    """The values of the units, float64 [units], of two float64 tensors [units].

    All NaN where the correlation does not exist: a side is constant or not finite.
    """
    a, b = _ranks(x), _ranks(y)
    c, v, w = (a * b).mean(), (a * a).mean(), (b * b).mean()
    if not bool(x.isfinite().all() & y.isfinite().all()) or not float(v * w) > 0:
        return torch.full_like(a, math.nan)
    rho = c / (v * w).sqrt()
    of_c = a * b + _above(x, b) + _above(y, a) - 3 * c
    of_v = a * a + 2 * _above(x, a) - 3 * v
    of_w = b * b + 2 * _above(y, b) - 3 * w
    return rho + of_c / (v * w).sqrt() - rho / 2 * (of_v / v + of_w / w)


def _ranks(x: Tensor) -> Tensor:
    """Mid-ranks over their number, minus one half: their mean is 0."""
    ordered = x.sort().values
    below, upto = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(x)) - 0.5


def _above(x: Tensor, weight: Tensor) -> Tensor:
    """For each unit the mean weight of the units above it, those level with it counted half."""
    ordered, order = x.sort()
    total = torch.cat([weight.new_zeros(1), weight[order].cumsum(0)])
    below, upto = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (total[-1] - (total[below] + total[upto]) / 2) / len(x)
