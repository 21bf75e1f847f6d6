"""Products of two matrices that are cast first: in bfloat16 where it holds their values.

On processors with AVX-512 BF16 or AMX, products of float32 tensors whose cast values bfloat16 holds
are multiplied in it, with sums in float32 (docs/numerics.md, section 10): the products of values
are exact either way, the order of the sums is another than PyTorch's.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.formats import E8M0, BlockFormat
from microscale.kernels.native import dense
from microscale.operands import Operand
from microscale.ops import ordinary
from microscale.watch import watched
from microscale.weights import (
    OwnCast,
    cast_detached,
    cast_operand,
    cast_values,
    cast_weight,
    is_uncast,
)

SMALLEST = 2**22
"""Multiplications from which bfloat16 gains; smaller products are PyTorch's in float32."""

FEWEST = 9
"""Rows of both factors from which it gains."""

_NORMAL = 2.0**-126
_TINY = 2.0**-120
_LARGE = 2.0**7


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A matrix, summed over `axis` (0 or 1) in a product, and how it is cast along that."""

    source: Tensor
    operand: Operand | None
    axis: int
    weight: bool = False

    @property
    def rows(self) -> int:
        """Its rows or columns that are not summed over."""
        return self.source.shape[1 - self.axis]

    @property
    def length(self) -> int:
        """What is summed over."""
        return self.source.shape[self.axis]

    def values(self) -> Tensor:
        """The cast values in the type of the source, straight-through."""
        cast = cast_weight if self.weight else cast_operand
        return cast(self.source, self.operand, self.axis)

    def narrow_values(self) -> Tensor:
        """The cast values in bfloat16, without a gradient."""
        assert self.operand is not None
        if self.weight:
            return cast_detached(self.source, self.operand, self.axis, torch.bfloat16)
        return cast_values(self.source.detach(), self.operand, self.axis, torch.bfloat16)

    def vanishes(self) -> bool:
        """Whether the cast may have values that even bfloat16's subnormals do not hold."""
        return dense.extent(self.source.detach().contiguous())[0] < _TINY


def suits(left: Factor, right: Factor) -> bool:
    """Whether bfloat16 may hold both casts, and multiplying it is worth its while."""
    if torch.compiler.is_compiling():
        return False
    work = left.rows * right.rows * left.length
    if work < SMALLEST or min(left.rows, right.rows) < FEWEST:
        return False
    for factor in (left, right):
        x, operand = factor.source, factor.operand
        if operand is None or isinstance(operand, OwnCast):
            return False
        if x.dtype is not torch.float32 or not ordinary(x):
            return False
        if not _narrow(operand.format):
            return False
    unseen = not (is_uncast() or watched() or torch.is_autocast_enabled("cpu"))
    return unseen and dense.available()


@lru_cache(maxsize=256)
def _narrow(fmt: BlockFormat) -> bool:
    """Whether elements have at most the 8 significant bits of bfloat16, and scales none."""
    bits = fmt.element.bits if fmt.element.is_integer else fmt.element.mantissa_bits + 1
    return fmt.scale == E8M0 and fmt.tensor_scale is None and not fmt.zero_point and bits <= 8


def multiply(
    left: Factor, right: Factor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The product [left rows, right rows] of cast factors, plus a bias for each column.

    Returns it and both casts, laid out as their sources. Gradients pass only where it does not
    `suits`.
    """
    if (pair := narrow_pair(left, right)) is not None:
        a, b = pair
        added = None if bias is None else bias.detach().contiguous()
        return dense.multiply(_turned(left, a), _turned(right, b), added), a, b
    a, b = left.values(), right.values()
    return F.linear(_turned(left, a), _turned(right, b), bias), a, b


def narrow_product(left: Factor, right: Factor, *, turned: bool = False) -> Tensor | None:
    """The product [left rows, right rows], or `turned` its transpose, contiguous either way.

    None where bfloat16 does not serve. Has no gradient.
    """
    if (pair := narrow_pair(left, right)) is None:
        return None
    a, b = _turned(left, pair[0]), _turned(right, pair[1])
    return dense.multiply(b, a) if turned else dense.multiply(a, b)


def narrow_pair(left: Factor, right: Factor) -> tuple[Tensor, Tensor] | None:
    """Both casts in bfloat16, laid out as their sources; None where it does not hold them."""
    if not suits(left, right):
        return None
    a, b = left.narrow_values(), right.narrow_values()
    return (a, b) if _exact(left, right, a, b) else None


def _turned(factor: Factor, values: Tensor) -> Tensor:
    """Have the axis that is summed over last."""
    return values if factor.axis else values.t()


def _exact(left: Factor, right: Factor, a: Tensor, b: Tensor) -> bool:
    """Whether casts in bfloat16 are those in float32, as far as a product in float32 can tell.

    Subnormals would be flushed. What is too small even for them has become zero, which matters
    where the other factor is large.
    """
    if not a.dtype is b.dtype is torch.bfloat16:
        return False
    (a_least, a_most), (b_least, b_most) = _extent(a), _extent(b)
    if min(a_least, b_least) < _NORMAL:
        return False
    return not ((b_most > _LARGE and left.vanishes()) or (a_most > _LARGE and right.vanishes()))


def _extent(values: Tensor) -> tuple[float, float]:
    """Smallest and largest magnitude, kept with the values: those of weights are asked again."""
    found: tuple[float, float] | None = values.__dict__.get("extent")
    if found is None:
        found = values.__dict__["extent"] = dense.extent(values)
    return found
