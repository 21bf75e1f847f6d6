"""Figures of the values of one operand, added up cast by cast, so that no values are kept.

Figures are over all values that are finite and whose cast is:

- signal-to-quantization-noise ratio: 10 log10(sum x^2 / sum (x - cast(x))^2), in dB;
- saturated: the share of values beyond the largest element times their scale;
- flushed: the share of values that are not zero and become zero;
- crest factor: largest magnitude over root mean square, of all values, and of a block's values as
  the mean over the blocks that are not all zero;
- kurtosis: E[(x - mean)^4] / variance^2, which is 3 for a normal distribution;
- outlier channels: positions along the axis of the cast (the axis that the product sums over)
  whose root mean square is more than `OUTLIER` times the median of all positions';
- scales: how many blocks have a scale in [2^e, 2^(e+1)), all-zero blocks left out.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from microscale.kernels import reference
from microscale.kernels.plan import plan
from microscale.operands import Operand
from microscale.weights import cast_values

OUTLIER = 6.0
"""How many times the median channel's root mean square an outlier channel has."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one operand; the top of the file defines them.

    Attributes:
        values: number of values counted.
        nonfinite: number of values that are not finite, or whose cast is not.
        sqnr: in dB; infinite where nothing was lost, NaN where all values are zero.
        saturated: share of values.
        flushed: share of values.
        crest: crest factor; NaN where all values are zero.
        block_crest: mean crest factor of the blocks; likewise.
        kurtosis: NaN where all values are the same.
        channels: how many there are; None where their number changes between calls.
        outliers: (channel, its root mean square over the median), the largest first.
        scales: (exponent, number of blocks), in the order of exponents.
    """

    values: int
    nonfinite: int
    sqnr: float
    saturated: float
    flushed: float
    crest: float
    block_crest: float
    kurtosis: float
    channels: int | None
    outliers: tuple[tuple[int, float], ...]
    scales: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; what is not a finite number is None."""
        names = ("sqnr", "saturated", "flushed", "crest", "block_crest", "kurtosis")
        numbers = {name: getattr(self, name) for name in names}
        return {
            "values": self.values,
            "nonfinite": self.nonfinite,
            **{name: x if math.isfinite(x) else None for name, x in numbers.items()},
            "channels": self.channels,
            "outliers": [{"channel": i, "ratio": ratio} for i, ratio in self.outliers],
            "scales": {str(exponent): count for exponent, count in self.scales},
        }


@dataclass(slots=True, eq=False)
class Tally:
    """Sums over the values that were cast as `operand` says."""

    operand: Operand
    values: int = 0
    nonfinite: int = 0
    saturated: int = 0
    flushed: int = 0
    largest: float = 0.0
    noise: float = 0.0
    powers: list[float] = field(default_factory=lambda: [0.0] * 4)
    blocks: int = 0
    crests: float = 0.0
    exponents: Counter[int] = field(default_factory=Counter)
    lengths: set[int] = field(default_factory=set)
    channels: Tensor | None = None

    def add(self, x: Tensor, axis: int) -> None:
        """Add the values of one cast of `x` along `axis`."""
        if not x.numel():
            return
        x = x.detach().reshape(x.shape or (1,))
        q = cast_values(x, self.operand, axis)
        counted = x.isfinite() & q.isfinite()
        self.values += int(counted.sum())
        self.nonfinite += int((~counted).sum())
        self.flushed += int(((q == 0) & (x != 0)).sum())
        known = torch.where(counted, x, 0.0).double()
        error = known - torch.where(counted, q, 0.0)
        self.noise += float(error.square().sum())
        self.largest = max(self.largest, float(known.abs().max()))
        square = known.square()
        powers = (known, square, square * known, square * square)
        self.powers = [s + float(p.sum()) for s, p in zip(self.powers, powers, strict=True)]
        self._add_channels(known, axis)
        self._add_blocks(x, axis, counted)

    def _add_channels(self, known: Tensor, axis: int) -> None:
        power = known.square().movedim(axis, -1).flatten(0, -2).sum(0).cpu()
        self.lengths.add(len(power))
        # Sums of different lengths are given up; `lengths` tells.
        if self.channels is None or self.channels.shape != power.shape:
            self.channels = power
        else:
            self.channels += power

    def _add_blocks(self, x: Tensor, axis: int, counted: Tensor) -> None:
        checked = plan(x, self.operand.format, axis, self.operand.options)
        self.saturated += int((counted & ~reference.in_range(x, checked)).sum())
        given, present = (
            reference.split(reference.widen(values, checked.format), checked)
            for values in (x, torch.ones_like(x))
        )
        blocks, scales = reference.scale(given, checked)
        sizes = zip(blocks.shape, scales.block.shape, strict=True)
        shared = [d for d, (size, count) in enumerate(sizes) if size != count]
        squares, number = blocks.double().square(), present.double()
        peak, power = squares, squares
        if shared:
            peak, power = squares.amax(shared, keepdim=True), squares.sum(shared, keepdim=True)
            number = number.sum(shared, keepdim=True)
        scale = scales.block.double()
        scale = scale if scales.tensor is None else scale * scales.tensor
        alive = (peak > 0) & peak.isfinite() & (scale > 0)
        self.blocks += int(alive.sum())
        self.crests += float((peak * number / power)[alive].sqrt().sum())
        exponents, counts = (torch.frexp(scale[alive])[1] - 1).unique(return_counts=True)
        self.exponents.update(dict(zip(exponents.tolist(), counts.tolist(), strict=True)))

    def figures(self) -> Figures:
        """The figures of all that was added."""
        count = max(self.values, 1)
        rms = math.sqrt(self.powers[1] / count)
        return Figures(
            values=self.values,
            nonfinite=self.nonfinite,
            sqnr=_decibels(self.powers[1], self.noise),
            saturated=self.saturated / count,
            flushed=self.flushed / count,
            crest=self.largest / rms if rms else math.nan,
            block_crest=self.crests / self.blocks if self.blocks else math.nan,
            kurtosis=_kurtosis([power / count for power in self.powers]),
            channels=next(iter(self.lengths)) if len(self.lengths) == 1 else None,
            outliers=tuple(self._outliers()),
            scales=tuple(sorted(self.exponents.items())),
        )

    def _outliers(self) -> list[tuple[int, float]]:
        if self.channels is None or len(self.lengths) != 1:
            return []
        sizes = self.channels.sqrt()
        median = float(sizes.median())
        if not median > 0:
            return []
        ratios = (sizes / median).tolist()
        found = [(channel, ratio) for channel, ratio in enumerate(ratios) if ratio > OUTLIER]
        return sorted(found, key=lambda pair: -pair[1])


def _decibels(signal: float, noise: float) -> float:
    if not signal > 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


def _kurtosis(moments: list[float]) -> float:
    """From the mean of x, x^2, x^3 and x^4; NaN where the variance is lost in rounding."""
    mean, square, cube, fourth = moments
    variance = square - mean**2
    if not variance > 1e-12 * square:
        return math.nan
    return (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2
