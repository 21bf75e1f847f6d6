"""The choice of shared scales.

Exponents come from bits or `frexp`, because the float32 log2 rounds up just below powers of two.
"""

import math

import torch
from torch import Tensor

from microscale.formats import BlockFormat, ElementFormat
from microscale.kernels.plan import Plan
from microscale.kernels.reference.blocks import block_maximum, shared_dimensions
from microscale.kernels.reference.elements import Scales, rounded, times
from microscale.kernels.reference.numbers import power_of_two, preround, round_to_grid, whole_range
from microscale.rounding import FlushSubnormals, Nonfinite, Options, Prerounding, ScaleRule

SMALLEST_NORMAL = 2.0**-126  # of float32


def scale(blocks: Tensor, plan: Plan, outer: Tensor | None = None) -> tuple[Tensor, Scales]:
    """The shared scale of every block, and the blocks after prerounding and flushing.

    `outer` is a tensor scale that was settled before, for blocks that are a part of a tensor.
    """
    options = plan.options
    if options.prerounding is Prerounding.BFLOAT16:
        blocks = preround(blocks, options.rounding)
    if options.flush_subnormals is FlushSubnormals.ELEMENT:
        blocks = torch.where(blocks.abs() < SMALLEST_NORMAL, blocks * 0.0, blocks)
    amax = block_maximum(blocks.abs(), plan)
    poisoned = ~amax.isfinite()
    if options.nonfinite is Nonfinite.ELEMENT:
        amax, poisoned = _finite_amax(blocks, amax, plan)
    if options.flush_subnormals is FlushSubnormals.BLOCK:
        flushed = amax < SMALLEST_NORMAL
        blocks = torch.where(flushed & blocks.isfinite(), blocks * 0.0, blocks)
        amax = amax.masked_fill(flushed, 0.0)
    amax = amax.masked_fill(poisoned, 0.0)
    if plan.format.scale.is_power_of_two:
        block = power_scale(amax, blocks, plan)
        return blocks, Scales(block.masked_fill(poisoned, math.nan), None)
    outer, zero = tensor_scale(amax, plan.format) if outer is None else outer, None
    if plan.format.scale.value is not None:
        block, zero = settled_scale(amax, plan.format)
    elif plan.format.zero_point:
        block, zero = span_scale(blocks.masked_fill(poisoned, 0.0), plan)
    else:
        block = _real_scale(amax, blocks, outer, plan)
    if options.nonfinite is Nonfinite.ELEMENT:
        # An infinity beside a scale that underflowed to zero would vanish: make it NaN instead.
        poisoned = poisoned | ((block == 0) & block_maximum(blocks.isinf(), plan))
    return blocks, Scales(block.masked_fill(poisoned, math.nan), outer, zero)


def _finite_amax(blocks: Tensor, amax: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The maximum of the finite values, and the blocks whose NaN the element cannot encode."""
    finite = torch.where(blocks.isfinite(), blocks, 0.0).abs()
    poisoned = torch.zeros_like(amax, dtype=torch.bool)
    return block_maximum(finite, plan), poisoned if plan.format.element.has_nan else amax.isnan()


def shared_exponent(amax: Tensor, fmt: BlockFormat) -> Tensor:
    """The exponent of each block's power-of-two scale, clamped to the scale format (int32)."""
    element, rule = fmt.element, fmt.rule
    significand, exponent = torch.frexp(amax)  # amax = significand x 2^exponent, in [0.5, 1)
    if rule is ScaleRule.RCEIL:
        largest, largest_exponent = math.frexp(element.largest)
        shared = exponent - largest_exponent + (significand > largest)
    else:
        shared = exponent - 1 - element.emax
        if rule is ScaleRule.CEIL:
            shared = shared + (significand != 0.5)
        elif rule is ScaleRule.SEVEN_QUARTERS:
            shared = shared + (significand >= 0.875)
        elif rule is ScaleRule.EVEN:
            # R carries into the next binade from the middle of the last gap below it.
            shared = shared + (significand >= 1.0 - math.ldexp(1.0, -element.mantissa_bits - 2))
    assert fmt.scale.exponents is not None
    low, high = fmt.scale.exponents
    zero = low if fmt.scale.is_biased else 0  # the all-zero block: scale code 0
    return shared.clamp(low, high).masked_fill(amax == 0, zero).to(torch.int32)


def power_scale(amax: Tensor, blocks: Tensor, plan: Plan) -> Tensor:
    """The power-of-two scale of each block, searched for where the rule says so."""
    exponent = shared_exponent(amax, plan.format)
    if plan.format.rule is not ScaleRule.MSE:
        return power_of_two(exponent, amax.dtype)
    assert plan.format.scale.exponents is not None
    low, high = plan.format.scale.exponents
    # The smaller first: it wins a tie. A block of zeros keeps the scale that zeros have.
    moves = (torch.where(amax == 0, 0, move) for move in (-1, 0, 1))
    near = [power_of_two((exponent + move).clamp(low, high).int(), amax.dtype) for move in moves]
    return least_error(blocks, [Scales(block, None) for block in near], plan)


def least_error(blocks: Tensor, candidates: list[Scales], plan: Plan) -> Tensor:
    """Of several scales for each block the first with the least sum of squared errors.

    Errors are those of rounding to nearest, summed in float64 in the order of the elements.
    """
    nearest = Plan(plan.format, plan.axis, Options(nonfinite=Nonfinite.ELEMENT))
    block, least = candidates[0].block, _squared_error(blocks, candidates[0], nearest)
    for scales in candidates[1:]:
        error = _squared_error(blocks, scales, nearest)
        block = torch.where(error < least, scales.block, block)
        least = torch.minimum(error, least)
    return block


def _squared_error(blocks: Tensor, scales: Scales, plan: Plan) -> Tensor:
    values = times(rounded(blocks, scales, plan), scales)
    errors = (blocks.double() - values.double()).nan_to_num(0.0, 0.0, 0.0).square()
    dims = shared_dimensions(blocks, plan)
    kept = [d for d in range(errors.dim()) if d not in dims]
    # On the CPU cumsum goes from the first element to the last, as no other sum of PyTorch does.
    ordered = errors.permute(*kept, *dims).flatten(len(kept)).cumsum(-1)[..., -1]
    return ordered.reshape([1 if d in dims else n for d, n in enumerate(errors.shape)])


def _real_scale(amax: Tensor, blocks: Tensor, outer: Tensor | None, plan: Plan) -> Tensor:
    """The real-valued scale of each block, of two candidates where the rule says so."""
    grid = plan.format.scale.grid
    assert grid is not None
    block = real_scale(amax, plan.format.element.largest, outer, grid)
    if plan.format.rule is not ScaleRule.FOUR_OVER_SIX:
        return block
    # Taking amax to 4 makes the scale larger, so amax to 6 comes first and wins a tie.
    candidates = [Scales(block, outer), Scales(real_scale(amax, 4.0, outer, grid), outer)]
    return least_error(blocks, candidates, plan)


def tensor_scale(amax: Tensor, fmt: BlockFormat) -> Tensor | None:
    """The outer scale: amax / (largest scale x largest element); 1 for zeros (NVFP4)."""
    if fmt.tensor_scale is None:
        return None
    assert fmt.tensor_scale.grid is not None
    quotient = amax.amax().double() / (fmt.scale.largest * fmt.element.largest)
    outer = round_to_grid(quotient, fmt.tensor_scale.grid).to(amax.dtype)
    return torch.where(quotient == 0, 1.0, outer)


def real_scale(amax: Tensor, largest: float, outer: Tensor | None, grid: ElementFormat) -> Tensor:
    """Block scales that take amax to `largest`, rounded once to the scale's grid; 1 for zeros.

    With an outer scale they are (amax / largest) / outer, each division rounded to the working
    type (NVFP4).
    """
    if outer is None:
        # In float64 the quotient is exact enough to be rounded once to any scale format.
        quotient = amax.double() / largest
    else:
        # A tensor scale that underflowed to zero leaves zero scales, not NaN.
        quotient = torch.where(outer == 0, 0.0, amax / largest / outer)
    return torch.where(amax == 0, 1.0, round_to_grid(quotient, grid).to(amax.dtype))


def settled_scale(amax: Tensor, fmt: BlockFormat) -> tuple[Tensor, Tensor | None]:
    """The scale, and the value of zero's code if it has one, that were settled beforehand."""
    value, code = fmt.scale.value, fmt.scale.zero
    assert value is not None
    scale = torch.full_like(amax, value)
    if code is None:
        return scale, None
    low, _ = whole_range(fmt.element)
    return scale, torch.full_like(amax, low + code * fmt.element.smallest)


def span_scale(blocks: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Scale and zero point that take a block's least and greatest values to the ends of the codes.

    Zero is among the values, so that it has a code. The scale is (greatest - least) in float64 over
    the range of the codes, rounded once to its grid (1 for zeros); the zero point is the lowest
    code minus the rounded quotient least / scale, within the codes.
    """
    element, grid = plan.format.element, plan.format.scale.grid
    assert grid is not None
    low, high = whole_range(element)
    finite = torch.where(blocks.isfinite(), blocks, 0.0)
    least = finite.amin(shared_dimensions(blocks, plan), keepdim=True).clamp(max=0.0)
    greatest = block_maximum(finite, plan).clamp(min=0.0)
    span = greatest.double() - least.double()
    scale = torch.where(span == 0, 1.0, round_to_grid(span / (high - low), grid)).to(blocks.dtype)
    quotient = least / scale.masked_fill(scale == 0, math.inf)
    steps = (quotient / element.smallest).round() * element.smallest
    zero = torch.where((span == 0) | (scale == 0), 0.0, (low - steps).clamp(low, high))
    return scale, zero
