"""Bits of accuracy: how finely a format with one real-valued scale holds a known distribution.

Bits of accuracy are log2(sigma / RMSE), sigma being the standard deviation of the distribution and
RMSE the root of the expected squared error under the range that makes it least (arXiv 2303.17951,
section 3.2 and Figure 5). Expectations are integrals, summed over points of the density up to
`FARTHEST` standard deviations: no samples, no seed. Tails matter: the variance of Student's t with
3 degrees of freedom ends far out, and integers have to give up either their range or their steps.

The best that 256 levels of any kind can do is Panter and Dite's law for companding,
MSE = (integral of p^(1/3))^3 / (12 x 256^2).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.formats import ElementFormat, float_format, integer_format
from microscale.kernels import reference

FARTHEST = 1e7
"""Where the tails are cut, in units of the distribution."""

POINTS = 2**17
LEVELS = 256

ELEMENTS: dict[str, ElementFormat] = {
    "INT8": integer_format(8),
    "E2": float_format(2, 5, "fnuz"),
    "E3": float_format(3, 4, "fnuz"),
    "E4": float_format(4, 3, "fnuz"),
    "E5": float_format(5, 2, "fnuz"),
}
"""The formats of 8 bits; one code is NaN and none is infinite, as the paper has it."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """A symmetric distribution by its density on x > 0, up to `end`."""

    name: str
    density: Callable[[Tensor], Tensor]
    end: float = FARTHEST

    def points(self) -> tuple[Tensor, Tensor, Tensor]:
        """Points x > 0 [n], the share of |x| around each, and the width that each stands for."""
        places = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
        if math.isfinite(self.end) and self.end <= 1:
            x, widths = places * self.end, torch.full_like(places, self.end / POINTS)
        else:
            # Even near 0, ever wider apart beyond it.
            reach = math.asinh(100 * self.end)
            x = torch.sinh(places * reach) / 100
            widths = torch.cosh(places * reach) / 100 * (reach / POINTS)
        shares = self.density(x) * widths
        return x, shares / shares.sum(), widths


def _student(degrees: float) -> Callable[[Tensor], Tensor]:
    constant = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
    constant /= math.sqrt(degrees * math.pi)
    return lambda x: constant * (1 + x.square() / degrees) ** (-(degrees + 1) / 2)


DISTRIBUTIONS = (
    Distribution("uniform", lambda x: torch.full_like(x, 0.5), end=1.0),
    Distribution("normal", lambda x: (-x.square() / 2).exp() / math.sqrt(2 * math.pi), end=40.0),
    Distribution("Student's t, 3 degrees", _student(3)),
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One distribution.

    `bits` of accuracy by format, the `ranges` that give them, in standard deviations, and the
    `bound` for any 256 levels.
    """

    distribution: str
    bits: dict[str, float]
    ranges: dict[str, float]
    bound: float

    @property
    def best(self) -> str:
        """The format with the most bits of accuracy."""
        return max(self.bits, key=self.bits.__getitem__)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "distribution": self.distribution,
            "bits": dict(self.bits),
            "ranges": dict(self.ranges),
            "bound": self.bound,
        }


def accuracies() -> tuple[Accuracy, ...]:
    """The bits of accuracy of all `ELEMENTS` for all `DISTRIBUTIONS`."""
    return tuple(_accuracy(distribution) for distribution in DISTRIBUTIONS)


def _accuracy(distribution: Distribution) -> Accuracy:
    x, shares, widths = distribution.points()
    sigma = math.sqrt(float((shares * x.square()).sum()))
    bits, ranges = {}, {}
    for name, element in ELEMENTS.items():
        most, error = _best_range(x, shares, element, sigma)
        bits[name], ranges[name] = math.log2(sigma / math.sqrt(error)), most / sigma
    cube = 2 * float(((shares / (2 * widths)) ** (1 / 3) * widths).sum())
    bound = math.log2(sigma / math.sqrt(cube**3 / (12 * LEVELS**2)))
    return Accuracy(distribution.name, bits, ranges, bound)


def _best_range(
    x: Tensor, shares: Tensor, element: ElementFormat, sigma: float
) -> tuple[float, float]:
    """The range with the least expected squared error, and that error."""

    def error(most: float) -> float:
        scale = most / element.largest
        values = reference.round_to_grid(x / scale, element) * scale
        return float((shares * (x - values).square()).sum())

    coarse = min(_steps(sigma / 2, sigma * 2**16, 2**0.25), key=error)
    best = min(_steps(coarse / 2**0.25, coarse * 2**0.25, 2 ** (1 / 128)), key=error)
    return best, error(best)


def _steps(start: float, stop: float, ratio: float) -> Iterator[float]:
    count = round(math.log(stop / start, ratio))
    return (start * ratio**i for i in range(count + 1))
