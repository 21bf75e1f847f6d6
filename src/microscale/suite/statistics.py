"""Means, standard errors and paired differences over units.

Units are weighted by their number of positions. The weighted mean m = sum(w x) / sum(w) is a
ratio of two means, so its variance is that of the linearised residuals w (x - m) (Cochran,
Sampling Techniques, 1977, section 6.4):

    error^2 = n / (n - 1) * sum(w^2 (x - m)^2) / sum(w)^2

With equal weights this is the usual standard error of a mean, s / sqrt(n), and a difference with
its interval is the paired t-interval. A function g of a mean (perplexity = exp(loss)) follows by
the delta method: its residuals are g'(m) w (x - m).
"""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.suite.extras import require

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `units` with its standard error and its 95 % t-interval.

    With one unit, or a value that is not finite, nothing is known of the error: it is NaN and the
    interval is all real numbers.
    """

    value: float
    error: float
    low: float
    high: float
    units: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values for JSON, which has neither NaN nor infinity: None stands there."""
        numbers = {"value": self.value, "error": self.error, "low": self.low, "high": self.high}
        finite = {
            name: number if math.isfinite(number) else None for name, number in numbers.items()
        }
        return {**finite, "units": self.units}


class Verdict(StrEnum):
    """What a comparison says of a finding."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "not distinguishable"
    UNTESTED = "not tested"


def mean(values: Tensor, weight: Tensor) -> Estimate:
    """Weighted mean of `values` [units], float64."""
    center = _center(values, weight)
    return _estimate(center, weight * (values - center), weight)


def perplexity(loss: Tensor, weight: Tensor) -> Estimate:
    """Exponential of the weighted mean loss in nats, with the error of the delta method."""
    center = _center(loss, weight)
    slope = _exp(center)
    return _estimate(slope, slope * weight * (loss - center), weight)


def difference(values: Tensor, base: Tensor, weight: Tensor) -> Estimate:
    """Paired difference of the weighted means, `values` minus `base`, over the same units."""
    return mean(values - base, weight)


def perplexity_difference(loss: Tensor, base: Tensor, weight: Tensor) -> Estimate:
    """Paired difference of two perplexities over the same units, by the delta method."""
    center, center_base = _center(loss, weight), _center(base, weight)
    slope, slope_base = _exp(center), _exp(center_base)
    residuals = slope * (loss - center) - slope_base * (base - center_base)
    return _estimate(slope - slope_base, weight * residuals, weight)


def sign(estimate: Estimate) -> Verdict:
    """Whether the whole interval lies above zero (holds), below it (does not hold), or neither."""
    if estimate.low > 0:
        return Verdict.HOLDS
    return Verdict.FAILS if estimate.high < 0 else Verdict.OPEN


def equivalence(estimate: Estimate, margin: float) -> Verdict:
    """Whether the whole interval lies within +-margin (holds), outside (does not), or neither."""
    if -margin <= estimate.low and estimate.high <= margin:
        return Verdict.HOLDS
    outside = estimate.low > margin or estimate.high < -margin
    return Verdict.FAILS if outside else Verdict.OPEN


def _center(values: Tensor, weight: Tensor) -> float:
    total = float(weight.sum())
    if not total > 0:
        raise MicroscaleError("the evaluation gave no position to count: every target is ignored.")
    return float((values * weight).sum()) / total


def _exp(value: float) -> float:
    """exp, infinite where float64 cannot hold it: the loss of a destroyed model may be large."""
    if value >= math.log(sys.float_info.max):
        return math.inf
    return math.exp(value)


def _estimate(value: float, residuals: Tensor, weight: Tensor) -> Estimate:
    units = len(weight)
    variance = float(residuals.square().sum())
    if units < 2 or not math.isfinite(value) or not math.isfinite(variance):
        return Estimate(value, math.nan, -math.inf, math.inf, units)
    error = math.sqrt(variance * units / (units - 1)) / float(weight.sum())
    reach = _quantile(units - 1) * error
    return Estimate(value, error, value - reach, value + reach, units)


def _quantile(degrees: int) -> float:
    """Two-sided Student t quantile for the 95 % interval."""
    stats = require("scipy.stats", "confidence intervals")
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, degrees))
