"""Which range of values a scale covers: estimators for blocks of data, and what they settle.

A range is a least and a greatest value. The scale that covers it is the one that the format's own
rule gives these two values, so that symmetric and asymmetric integers, floats and power-of-two
scales need no rules of their own. Values beyond the range saturate.

Sources: the estimators and their settings are those of arXiv 2303.17951 and 2208.09225 (and the
code published with the latter): 111 candidates from 0.1 to 1.2 of the largest magnitude, and a
running average of momentum 0.9.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.formats import UNIT, BlockFormat, float_format, settled_scale
from microscale.kernels import reference
from microscale.kernels.plan import Plan
from microscale.kernels.plan import plan as make_plan
from microscale.kernels.reference import Scales
from microscale.kernels.storage import Layout
from microscale.operands import Operand
from microscale.rounding import Law, Nonfinite, Options, ScaleRule
from microscale.tensor import BlockTensor

MOMENTUM = 0.9
"""Weight of the average so far in a running average of ranges."""

TAIL = 1e-4
"""Share of the values that a percentile leaves beyond either end of the range."""

MOST_EXPONENT_BITS = 5
"""How many exponent bits are tried at most: those of E5M2, as arXiv 2303.17951 does."""

CANDIDATES = tuple(0.1 + 0.01 * i for i in range(111))
"""The fractions of the whole range that are tried for the least squared error."""


class Estimator(Law):
    """How a range is found from values."""

    MINMAX = "minmax", "the least and the greatest value of all"
    RUNNING = "running", "least and greatest of each batch, r = 0.9 r + 0.1 batch, from the first"
    PERCENTILE = "percentile", "what leaves 0.01 % of the values beyond either end"
    MSE = "mse", "of 0.10, 0.11, ... 1.20 times minmax the one with the least squared error"


def check_ranged(fmt: BlockFormat) -> None:
    """Refuse formats whose scales are no ranges. Raises MicroscaleError."""
    if fmt.tensor_scale is not None or fmt.scale == UNIT or fmt.scale.value is not None:
        reason = "two scales" if fmt.tensor_scale is not None else f"the fixed scale {fmt.scale}"
        raise MicroscaleError(
            f"format {fmt} has {reason}, so there is no range to estimate; use one such as "
            "int8-channel or fp8_e4m3-tensor."
        )


def with_any_exponent(fmt: BlockFormat) -> tuple[BlockFormat, ...]:
    """The formats that differ from `fmt` in how many bits of its elements are exponent, 2 or more.

    `fmt` itself is the first, so that it wins a tie. Raises MicroscaleError for integers, fixed
    biases and elements that have no choice.
    """
    element = fmt.element
    if element.is_integer:
        raise MicroscaleError(
            f"format {fmt} has no exponent bits to search; use floats, such as fp8_e4m3fnuz-tensor."
        )
    usual = float_format(element.exponent_bits, element.mantissa_bits, element.specials)
    if usual != element:
        raise MicroscaleError(
            f"format {fmt} has the bias {element.bias}, which other numbers of exponent bits do "
            "not have; leave the bias away."
        )
    others = []
    for exponent in range(2, MOST_EXPONENT_BITS + 1):
        mantissa = element.code_bits - exponent
        if mantissa > 0 and exponent != element.exponent_bits:
            made = float_format(exponent, mantissa, element.specials)
            others.append(replace(fmt, element=made))
    if not others:
        raise MicroscaleError(f"format {fmt} has one number of exponent bits alone.")
    return (fmt, *others)


def scales_of(low: Tensor, high: Tensor, fmt: BlockFormat) -> Scales:
    """The scales, and zero points, that cover ranges [blocks, 1], by the format's rule."""
    _, scales = reference.scale(torch.cat((low, high), 1), _plan(fmt))
    return scales


def extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest value [blocks, 1] of each of the rows [blocks, values]."""
    return rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)


def percentile(rows: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range [blocks, 1] that leaves `TAIL` of the values beyond either end.

    Ends are values of the rows: the least (greatest) one up to (from) which more than `TAIL` lies.
    `weights` [values] is how many values each one stands for.
    """
    ordered, order = rows.sort(1)
    weights = torch.ones(rows.shape[1], dtype=torch.float64) if weights is None else weights
    below = weights.to(rows.device).double()[order].cumsum(1)
    total = below[:, -1:].clone()
    first = (below <= TAIL * total).sum(1, keepdim=True)
    from_above = total - below + weights.to(rows.device).double()[order]
    last = (from_above > TAIL * total).sum(1, keepdim=True) - 1
    return ordered.gather(1, first), ordered.gather(1, last)


def least_error(rows: Tensor, fmt: BlockFormat, weights: Tensor | None = None) -> Scales:
    """Of the scales of `CANDIDATES` for each row the first with the least squared error.

    Errors are those of rounding to nearest, in float64.
    """
    low, high = extremes(rows)
    best, least = None, torch.full_like(low, math.inf, dtype=torch.float64)
    for scales in _candidates(low, high, fmt):
        values = reference.times(reference.rounded(rows, scales, _plan(fmt)), scales)
        squares = (rows.double() - values.double()).square()
        if weights is not None:
            squares *= weights.to(rows.device)
        error = squares.sum(1, keepdim=True)
        better = error < least
        best = scales if best is None else _where(better, scales, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _candidates(low: Tensor, high: Tensor, fmt: BlockFormat) -> Iterator[Scales]:
    """The scales of `CANDIDATES`, all found at once."""
    fractions = torch.tensor(CANDIDATES, dtype=low.dtype, device=low.device).unsqueeze(1)
    lows, highs = ((fractions * end.T).reshape(-1, 1) for end in (low, high))
    every = scales_of(lows, highs, fmt)
    zeros = [None] * len(CANDIDATES) if every.zero is None else every.zero.chunk(len(CANDIDATES))
    for block, zero in zip(every.block.chunk(len(CANDIDATES)), zeros, strict=True):
        yield Scales(block, None, zero)


def _where(chosen: Tensor, scales: Scales, others: Scales) -> Scales:
    zero = None
    if scales.zero is not None and others.zero is not None:
        zero = torch.where(chosen, scales.zero, others.zero)
    return Scales(torch.where(chosen, scales.block, others.block), None, zero)


@lru_cache(maxsize=256)
def _plan(fmt: BlockFormat) -> Plan:
    """Rows [blocks, values] that each share a scale; infinities are checked for elsewhere."""
    return Plan(replace(fmt, block="token"), 1, Options(nonfinite=Nonfinite.ELEMENT))


# ---------------------------------------------------------------- tensors that are all there


def quantize_ranged(
    x: Tensor, operand: Operand, axis: int, estimator: str | Estimator
) -> BlockTensor:
    """Pack a tensor with scales that cover the ranges that `estimator` finds for its blocks.

    Args:
        x: any shape; all of it is one batch, so "running" is "minmax".
        operand: a format with one scale (and zero point) for each block along `axis`, and how
            values are rounded. The zeros that fill a ragged last block count among its values.
        axis: as in `cast`.
        estimator: one of `Estimator`.

    Returns:
        A BlockTensor of x's shape and dtype.

    Raises:
        MicroscaleError: a format without ranges, values that are not finite.
    """
    estimator, fmt = Estimator(estimator), operand.format
    check_ranged(fmt)
    plan = make_plan(x, fmt, axis, operand.options)
    if not x.isfinite().all():
        raise MicroscaleError(
            f"x holds {int((~x.isfinite()).sum())} values that are NaN or infinite, so it has no "
            "range."
        )
    wide = reference.widen(x, fmt)
    blocks, scales = reference.scale(reference.split(wide, plan), plan)
    if estimator not in (Estimator.MINMAX, Estimator.RUNNING) and x.numel():
        scales = _searched(blocks, scales, fmt, estimator)
    values = reference.rounded(blocks, scales, plan)
    stored = reference.store(values, scales, tuple(wide.shape), plan)
    return BlockTensor(stored, Layout.of(plan, x.dtype), x.shape, x.dtype)


def _searched(blocks: Tensor, scales: Scales, fmt: BlockFormat, estimator: Estimator) -> Scales:
    """Scales in the shape of `scales`, for blocks that share each of them."""
    sizes = zip(blocks.shape, scales.block.shape, strict=True)
    shared = [d for d, (size, count) in enumerate(sizes) if size != count]
    kept = [d for d in range(blocks.dim()) if d not in shared]
    rows = blocks.permute(*kept, *shared).reshape(scales.block.numel(), -1)
    if estimator is Estimator.MSE:
        found = least_error(rows, fmt)
    else:
        found = scales_of(*percentile(rows), fmt)
    # Dimensions that are shared have the size 1, so the order of the others is that of the blocks.
    shape = scales.block.shape
    zero = None if found.zero is None else found.zero.reshape(shape)
    return Scales(found.block.reshape(shape), None, zero)


# ---------------------------------------------------------------- data that comes in batches

EXTREME = 1024
"""Values of the largest magnitude that are all kept: they decide where a range ends."""

KEPT = 2**14
"""Values that are kept of the others, drawn at random."""


@dataclass(slots=True, eq=False)
class Sample:
    """What is kept of values that come in batches, to estimate one range for all of them.

    The `EXTREME` largest magnitudes are kept exactly. Of the others `KEPT` are drawn at random,
    each equally likely, and stand for all of them: sums over the sample, so weighted, are unbiased,
    and exact as long as no more values came.
    """

    seed: int = 0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    running: tuple[float, float] | None = None
    _largest: Tensor = field(default_factory=lambda: torch.empty(0))
    _drawn: Tensor = field(default_factory=lambda: torch.empty(0))
    _keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    _generator: torch.Generator | None = None
    _settled: dict[tuple[BlockFormat, Estimator], BlockFormat] = field(default_factory=dict)

    def add(self, batch: Tensor) -> None:
        """Add a batch of values of any shape; MicroscaleError if some are not finite."""
        x = batch.detach().flatten().float().cpu()
        if not x.numel():
            return
        if not x.isfinite().all():
            raise MicroscaleError(
                f"{int((~x.isfinite()).sum())} of {x.numel()} values are NaN or infinite; leave "
                "such samples out."
            )
        low, high = float(x.amin()), float(x.amax())
        self._settled.clear()
        self.count += len(x)
        self.low, self.high = min(self.low, low), max(self.high, high)
        before = self.running or (low, high)
        new, old = (low, high), before
        mixed = [MOMENTUM * o + (1 - MOMENTUM) * n for o, n in zip(old, new, strict=True)]
        self.running = new if self.running is None else (mixed[0], mixed[1])
        self._keep(x)

    def _keep(self, x: Tensor) -> None:
        if self._generator is None:
            self._generator = torch.Generator().manual_seed(self.seed)
        x = torch.cat((self._largest, x))
        largest = x.abs().topk(min(EXTREME, len(x))).indices
        others = torch.ones(len(x), dtype=torch.bool)
        others[largest] = False
        self._largest, rest = x[largest], x[others]
        # The smallest of random keys, one for each value: every value is as likely as any other.
        keys = torch.rand(len(rest), generator=self._generator, dtype=torch.float64)
        if len(self._keys) == KEPT:
            below = keys < self._keys.max()
            keys, rest = keys[below], rest[below]
        keys, drawn = torch.cat((self._keys, keys)), torch.cat((self._drawn, rest))
        chosen = keys.topk(min(KEPT, len(keys)), largest=False).indices
        self._drawn, self._keys = drawn[chosen], keys[chosen]

    @property
    def values(self) -> Tensor:
        """The values that are kept."""
        return torch.cat((self._largest, self._drawn))

    @property
    def weights(self) -> Tensor:
        """How many values each of `values` stands for, float64."""
        weights = torch.ones(len(self._largest) + len(self._drawn), dtype=torch.float64)
        if len(self._drawn):
            weights[len(self._largest) :] = (self.count - len(self._largest)) / len(self._drawn)
        return weights

    def settle(self, fmt: BlockFormat, estimator: str | Estimator) -> BlockFormat:
        """The format with its scale settled for all values, for tensors of which it has one.

        Raises MicroscaleError for a format with other blocks or without ranges, and if nothing was
        added.
        """
        estimator = Estimator(estimator)
        check_ranged(fmt)
        if fmt.block != "tensor":
            raise MicroscaleError(
                f"format {fmt} has more than one scale for a tensor; a range for all data needs "
                f"the block 'tensor': {replace(fmt, block='tensor')}."
            )
        if not self.count:
            raise MicroscaleError("there are no values to estimate a range from.")
        key = fmt, estimator
        if key not in self._settled:
            self._settled[key] = self._settle(fmt, estimator)
        return self._settled[key]

    def settle_any(self, formats: Sequence[BlockFormat], estimator: str | Estimator) -> BlockFormat:
        """Of several formats the first whose settled scale has the least squared error."""
        return min((self.settle(fmt, estimator) for fmt in formats), key=self.error)

    def error(self, fmt: BlockFormat) -> float:
        """The sum of squared errors of all values under a settled format."""
        values = self.values
        squares = (values.double() - cast(values, fmt).double()).square()
        return float((squares * self.weights).sum())

    def _settle(self, fmt: BlockFormat, estimator: Estimator) -> BlockFormat:
        scales = self._scales(fmt, estimator)
        zero = None
        if scales.zero is not None:
            lowest, _ = reference.whole_range(fmt.element)
            zero = round((float(scales.zero) - lowest) / fmt.element.smallest)
        return replace(fmt, scale=settled_scale(float(scales.block), zero), rule=ScaleRule.AMAX)

    def _scales(self, fmt: BlockFormat, estimator: Estimator) -> Scales:
        dtype = reference.working(torch.float32, fmt)
        rows = self.values.to(dtype).unsqueeze(0)
        if estimator is Estimator.MSE:
            return least_error(rows, fmt, self.weights)
        if estimator is Estimator.PERCENTILE:
            return scales_of(*percentile(rows, self.weights), fmt)
        ends = (self.low, self.high) if estimator is Estimator.MINMAX else self.running
        assert ends is not None
        low, high = (rows.new_full((1, 1), end) for end in ends)
        return scales_of(low, high, fmt)
