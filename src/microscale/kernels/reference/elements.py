"""Values of elements: x / scale rounded to the element's grid, and back."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from microscale.kernels.philox import random_words
from microscale.kernels.plan import Plan
from microscale.kernels.reference.blocks import split
from microscale.kernels.reference.numbers import round_to_grid, round_to_integer, whole_range
from microscale.rounding import Nonfinite, Rounding


class Scales(NamedTuple):
    """The shared scales of a tensor, as values that broadcast against its blocks."""

    block: Tensor  # NaN where the whole block is NaN
    tensor: Tensor | None  # the outer scale of NVFP4, zero-dimensional
    zero: Tensor | None = None  # the element value that stands for zero


def times(values: Tensor, scales: Scales) -> Tensor:
    """Element values times their scales, rounded once per product (exact for powers of two)."""
    product = values * scales.block
    return product if scales.tensor is None else product * scales.tensor


def rounded(blocks: Tensor, scales: Scales, plan: Plan, words: Tensor | None = None) -> Tensor:
    """The values x / scale on the element's grid."""
    element, options = plan.format.element, plan.options
    if scales.tensor is None and plan.format.scale.is_power_of_two:
        quotient = blocks / scales.block
    else:
        divisor = scales.block if scales.tensor is None else scales.block * scales.tensor
        # A scale that underflowed to zero stands for a block of (signed) zeros.
        quotient = blocks / divisor.masked_fill(divisor == 0, math.inf)
    if scales.zero is not None:
        low, high = whole_range(element)
        steps = round_to_integer(quotient / element.smallest, options.rounding, words)
        return (steps * element.smallest + scales.zero).clamp(low, high) - scales.zero
    values = round_to_grid(quotient, element, options.rounding, options.overflow, words)
    if options.nonfinite is Nonfinite.ELEMENT and element.has_inf:
        values = torch.where(quotient.isinf(), quotient, values)
    return values


def random_like(x: Tensor, plan: Plan, seed: Tensor | None) -> Tensor | None:
    """32 random bits for each element of the blocks of `x`, where the rounding needs them.

    They depend on the key and the logical index of the element in the whole tensor, of which x may
    be a shard along dimension 0: `seed` is int64 [4], the seed, the numbers of the call and of the
    operand, and the index of x's first element.
    """
    if plan.options.rounding is not Rounding.STOCHASTIC:
        return None
    assert seed is not None
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape or (1,)) + seed[3]
    return split(random_words(index, seed[:3]), plan)
