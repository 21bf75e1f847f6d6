"""How the values of one weight are rounded: shared scales that are settled one block at a time.

A cast settles all scales of a tensor at once and then rounds. A solver that carries the error of
one column into the next needs the two apart: the scale of a block when it gets there, then values
column by column. Both are the kernels' own functions, so values and scales are those that a cast
would give for the same numbers.

Weights are matrices [groups, K, N] here: K is summed over, N are the outputs.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from microscale.formats import BlockFormat
from microscale.kernels import reference
from microscale.kernels.plan import Plan
from microscale.kernels.reference import Scales
from microscale.operands import Operand
from microscale.rounding import ScaleRule

Search = Literal["rule", "mse"]
"""How a block's scale is chosen: by the format's rule, or by the least squared error."""

_FRACTIONS = tuple(i / 20 for i in range(8, 24))
"""What a searched real-valued scale may be of the rule's, besides that itself."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A weight's operand and what is shared by the whole weight.

    Attributes:
        operand: format and rounding.
        dtype: of the weight, in which its values are used.
        search: how scales are chosen.
        outer: the tensor scale of formats that have one.
        whole: the one scale of a format with one for the whole tensor.
    """

    operand: Operand
    dtype: torch.dtype
    search: Search = "rule"
    outer: Tensor | None = None
    whole: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, operand: Operand, search: Search = "rule") -> "Grid":
        """The grid of a whole weight: what all of its blocks share is settled here."""
        fmt = operand.format
        grid = cls(operand, weight.dtype, search)
        amax = reference.widen(weight, fmt).abs().amax() if weight.numel() else torch.zeros(())
        if fmt.tensor_scale is not None:
            grid = replace(grid, outer=reference.tensor_scale(amax, fmt))
        if fmt.block == "tensor":
            flat = weight.reshape(1, -1, 1)
            grid = replace(grid, whole=grid.settle(flat))
        return grid

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return self.operand.format

    def settle(self, values: Tensor, importance: Tensor | None = None) -> Tensor:
        """The scales [groups, 1, N] of one block of columns.

        Args:
            values: [groups, B, N], B values that share a scale for each output.
            importance: [groups, B], what an error in each column weighs in a search.
        """
        if self.whole is not None:
            return self.whole.expand(len(values), 1, values.shape[-1])
        return self._settled(values, importance)

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """The elements (codes as numbers) nearest to values / scale; shapes as in `settle`."""
        wide = reference.widen(values, self.format).reshape(values.shape)
        return reference.rounded(wide.to(scale.dtype), Scales(scale, self.outer), self._plan)

    def decode(self, elements: Tensor, scale: Tensor) -> Tensor:
        """Elements times their scales, as the decoded weight has them (in the weight's type)."""
        return reference.narrow(reference.times(elements, Scales(scale, self.outer)), self.dtype)

    @property
    def compute(self) -> torch.dtype:
        """The type in which scales and elements are computed."""
        return reference.working(self.dtype, self.format)

    @property
    def _plan(self) -> Plan:
        """Blocks as long as axis 1: whatever is given there shares a scale."""
        options = self.operand.options
        return Plan(replace(self.format, block="token"), 1, options)

    def _settled(self, values: Tensor, importance: Tensor | None) -> Tensor:
        values = values.to(self.compute)
        _, scales = reference.scale(values, self._plan, self.outer)
        if self.search == "rule":
            return scales.block
        return self._searched(values, scales.block, importance)

    def _searched(self, values: Tensor, first: Tensor, importance: Tensor | None) -> Tensor:
        """Of some scales near the rule's the one with the least (weighted) squared error."""
        best, least = first, self._error(values, first, importance)
        for scale in self._near(first):
            error = self._error(values, scale, importance)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best

    def _near(self, first: Tensor) -> list[Tensor]:
        fmt = self.format.scale
        if fmt.is_power_of_two:
            assert fmt.exponents is not None
            exponent = torch.frexp(first.nan_to_num(1.0))[1] - 1
            moved = ((exponent + move).clamp(*fmt.exponents).int() for move in (-1, 1))
            near = [reference.power_of_two(e, first.dtype) for e in moved]
        else:
            assert fmt.grid is not None
            fractions = (fraction for fraction in _FRACTIONS if fraction != 1)
            near = [
                reference.round_to_grid(first.double() * f, fmt.grid).to(first.dtype)
                for f in fractions
            ]
        # What is not finite stays so, and a scale of zero is no scale.
        return [torch.where(first.isfinite() & (s > 0), s, first) for s in near]

    def _error(self, values: Tensor, scale: Tensor, importance: Tensor | None) -> Tensor:
        decoded = reference.times(self.round(values, scale), Scales(scale, self.outer))
        squares = (values.double() - decoded.double()).square().nan_to_num(math.inf)
        if importance is not None:
            squares *= importance.double().unsqueeze(-1)
        return squares.sum(1, keepdim=True)


def rule_of(fmt: BlockFormat) -> Search:
    """A format whose own rule is a search needs no second one."""
    return "rule" if fmt.rule in (ScaleRule.MSE, ScaleRule.FOUR_OVER_SIX) else "mse"
