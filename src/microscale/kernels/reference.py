"""The algorithm in plain PyTorch: scale, round, encode, pack. The specification of all kernels.

Layout: the cast's axis is split in place into (blocks, values of a block), so that any axis is
cast without moving memory; a ragged last block is padded with zeros, which change no maximum.

Range: float64 input is computed in float64, everything else in float32. Dividing by a power of two
only loses bits of values far below half the smallest element, which round to zero either way; so
power-of-two scales are exact. Exponents come from bits or `frexp`, because the float32 log2 rounds
up just below powers of two.

Cost: about a dozen passes over the data. The steps stay apart here, because the C++ and Triton
kernels are read beside them.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from microscale.formats import BlockFormat, ElementFormat, ScaleFormat, packing_group
from microscale.kernels.philox import random_words
from microscale.kernels.plan import Plan
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_storage
from microscale.rounding import (
    FlushSubnormals,
    Nonfinite,
    Options,
    Overflow,
    Prerounding,
    Rounding,
    ScaleRule,
)

SMALLEST_NORMAL = 2.0**-126  # of float32
UNBOUNDED_NAN = -(2**15)  # the int16 that stands for a NaN scale without a bound


class Scales(NamedTuple):
    """The shared scales of a tensor, as values that broadcast against its blocks."""

    block: Tensor  # NaN where the whole block is NaN
    tensor: Tensor | None  # the outer scale of NVFP4, zero-dimensional
    zero: Tensor | None = None  # the element value that stands for zero


# ---------------------------------------------------------------- whole casts


def cast(x: Tensor, plan: Plan, dtype: torch.dtype, seed: Tensor | None = None) -> Tensor:
    """Values of `x` on the format's grid: `dequantize(quantize(x))` without packing."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    blocks, scales = scale(split(widen(x, plan.format), plan), plan)
    values = times(rounded(blocks, scales, plan, random_like(x, plan, seed)), scales)
    return narrow(merge(values, x.shape, plan), dtype).contiguous()


def in_range(x: Tensor, plan: Plan) -> Tensor:
    """Whether |x| <= largest x scale: false where a cast saturates. NaN is out of range."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=torch.bool, device=x.device)
    blocks, scales = scale(split(widen(x, plan.format), plan), plan)
    least, most = limits(scales, plan.format)
    return merge((least <= blocks) & (blocks <= most), x.shape, plan).contiguous()


def limits(scales: Scales, fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each block that do not saturate."""
    element, zero = fmt.element, scales.zero
    low, high = element.lowest, element.largest
    if zero is not None:
        # Zero was rounded to a code: within half a step the ends still round to the last ones.
        low, high = whole_range(element)[0] - element.smallest / 2, high + element.smallest / 2
    if not fmt.scale.is_power_of_two:
        # A real scale is rounded, so amax itself may lie an ulp or two beyond largest x scale.
        low, high = low * (1 + 2.0**-22), high * (1 + 2.0**-22)
    ends = (torch.full_like(scales.block, end) for end in (low, high))
    least, most = (times(end if zero is None else end - zero, scales) for end in ends)
    return least, most


def quantize(x: Tensor, plan: Plan, seed: Tensor | None = None) -> Stored:
    """Packed codes and stored scales, the block axis last, and the tensor scale (else empty)."""
    fmt, shape = plan.format, x.shape or (1,)
    x = x.reshape(shape)
    if x.numel() == 0:
        return _storage_of_nothing(x, plan)
    blocks, scales = scale(split(widen(x, fmt), plan), plan)
    return store(rounded(blocks, scales, plan, random_like(x, plan, seed)), scales, shape, plan)


def store(values: Tensor, scales: Scales, shape: tuple[int, ...], plan: Plan) -> Stored:
    """Packed codes and stored scales of split blocks whose `values` are on the element's grid."""
    fmt = plan.format
    if scales.zero is not None:
        values = values + scales.zero
    codes = merge(encode(values, fmt.element), shape, plan)
    packed = pack(codes.movedim(plan.axis, -1), fmt.element.bits, fmt.padding)
    stored = gather_shared(encode_scale(scales.block, fmt.scale), plan, len(shape))
    outer = values.new_empty(0) if scales.tensor is None else scales.tensor.reshape(1)
    zero = torch.empty(0, dtype=torch.int8, device=values.device)
    if scales.zero is not None:
        zero = gather_shared((scales.zero / fmt.element.smallest).to(torch.int8), plan, len(shape))
    return packed, stored, outer.float(), zero


def _storage_of_nothing(x: Tensor, plan: Plan) -> Stored:
    """What an empty tensor is stored as: scales, where there are any, are those of zeros."""
    codes, scales, outer, zero = empty_storage(x, plan)
    real = not plan.format.scale.is_power_of_two
    one = encode_scale(torch.ones(()), plan.format.scale).item() if real else 0
    return codes, scales.fill_(one), outer.fill_(1.0), zero.fill_(0)


def dequantize(stored: Stored, layout: Layout, length: int, dtype: torch.dtype) -> Tensor:
    """Decoded values, contiguous, with the block axis of `length` values back in its place."""
    (codes, scales, tensor_scale, zero_point), fmt, axis = stored, layout.format, layout.axis
    shape = decoded_shape(codes, axis, length)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device=codes.device)
    wide = working(layout.compute, fmt)
    plan = Plan.of(fmt, axis)
    values = decode(unpack(codes, fmt.element.bits, length), fmt.element, wide)
    blocks = split(values.movedim(-1, axis), plan)
    block = spread_shared(decode_scale(scales, fmt.scale, wide), plan)
    if fmt.zero_point:
        blocks = blocks - spread_shared(zero_point.to(wide) * fmt.element.smallest, plan)
    outer = tensor_scale.to(wide).reshape(()) if tensor_scale.numel() else None
    values = merge(times(blocks, Scales(block, outer)), shape, plan)
    return narrow(values, dtype).contiguous()


# ---------------------------------------------------------------- blocks


def working(dtype: torch.dtype, fmt: BlockFormat) -> torch.dtype:
    """The type to compute in. Exponents without a bound need float64's range for any input."""
    unbounded = fmt.scale.exponents is not None and fmt.scale.exponents[0] < -149
    return torch.float64 if unbounded or dtype is torch.float64 else torch.float32


def widen(x: Tensor, fmt: BlockFormat) -> Tensor:
    """The values in the type to compute in, with at least one dimension."""
    return x.detach().reshape(x.shape or (1,)).to(working(x.dtype, fmt))


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the output type, once: PyTorch takes float64 to 16 bits by way of float32."""
    if values.dtype is not torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    return _to_odd(values).to(dtype)


def _to_odd(values: Tensor) -> Tensor:
    """Round float64 to float32, what is between two values to the odd one.

    So what lies beside a tie of a narrower type stays beside it.
    """
    near = values.float()
    beyond = near.double().abs() > values.abs()
    inexact = (near.double() != values) & ~values.isnan()
    bits = near.view(torch.int32) - beyond.int()  # towards zero
    return (bits | inexact.int()).view(torch.float32)


def split(x: Tensor, plan: Plan) -> Tensor:
    """Split the axis into (blocks, values of a block); whole blocks stay as they are.

    Tiles become (..., blocks of rows, rows of a tile, blocks, values of a row).
    """
    if isinstance(plan.format.block, tuple):
        return _split_tiles(x, plan)
    if not isinstance(plan.format.block, int):
        return x
    # An axis shorter than a block is one block: padding it would multiply depthwise kernels.
    size = min(plan.format.block, x.shape[plan.axis])
    ragged = -x.shape[plan.axis] % size
    if ragged:
        x = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1 - plan.axis) + (0, ragged))
    blocks: Tensor = x.unflatten(plan.axis, (-1, size))
    return blocks


def _split_tiles(x: Tensor, plan: Plan) -> Tensor:
    assert isinstance(plan.format.block, tuple)
    rows = plan.rows(x.dim())
    x = x.unsqueeze(0) if rows is None else x.movedim((rows, plan.axis), (-2, -1))
    height, width = (min(s, n) for s, n in zip(plan.format.block, x.shape[-2:], strict=True))
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % width, 0, -x.shape[-2] % height))
    tiles: Tensor = x.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    return tiles


def _merge_tiles(tiles: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    joined = tiles.flatten(-2).flatten(-3, -2)
    rows = plan.rows(len(shape))
    if rows is None:
        return joined.flatten()[: math.prod(shape)]
    cut = joined[..., : shape[rows], : shape[plan.axis]]
    return cut.movedim((-2, -1), (rows, plan.axis))


def merge(blocks: Tensor, shape: tuple[int, ...], plan: Plan) -> Tensor:
    """Undo `split`: join the axis, cut the padding, restore zero dimensions."""
    if isinstance(plan.format.block, tuple):
        blocks = _merge_tiles(blocks, shape, plan)
    if isinstance(plan.format.block, int):
        joined = blocks.flatten(plan.axis, plan.axis + 1)
        blocks = joined.narrow(plan.axis, 0, shape[plan.axis] if shape else 1)
    return blocks.reshape(shape)


def _largest(magnitudes: Tensor, plan: Plan) -> Tensor:
    """The largest value of each block, with the reduced dimensions kept."""
    return magnitudes.amax(_shared(magnitudes, plan), keepdim=True)


def _shared(blocks: Tensor, plan: Plan) -> tuple[int, ...]:
    """The dimensions of split blocks that share a scale."""
    if isinstance(plan.format.block, tuple):
        return (blocks.dim() - 3, blocks.dim() - 1)
    counted = isinstance(plan.format.block, int)
    return (plan.axis + 1,) if counted else plan.reduced(blocks.dim())


def gather_shared(shared: Tensor, plan: Plan, dimensions: int) -> Tensor:
    """What each block has one of, as it is stored: without the values, the axis last."""
    if isinstance(plan.format.block, tuple):
        tiles = shared.squeeze(-1).squeeze(-2)
        rows = plan.rows(dimensions)
        tiles = tiles.squeeze(0) if rows is None else tiles.movedim(-2, rows - (rows > plan.axis))
        return tiles.contiguous()
    if isinstance(plan.format.block, int):
        shared = shared.squeeze(plan.axis + 1)
    return shared.movedim(plan.axis, -1).contiguous()


def spread_shared(stored: Tensor, plan: Plan) -> Tensor:
    """Undo `gather_shared`."""
    if isinstance(plan.format.block, tuple):
        rows = plan.rows(stored.dim())
        tiles = (
            stored.unsqueeze(0) if rows is None else stored.movedim(rows - (rows > plan.axis), -2)
        )
        return tiles.unsqueeze(-2).unsqueeze(-1)
    shared = stored.movedim(-1, plan.axis)
    return shared.unsqueeze(plan.axis + 1) if isinstance(plan.format.block, int) else shared


# ---------------------------------------------------------------- scale


def scale(blocks: Tensor, plan: Plan, outer: Tensor | None = None) -> tuple[Tensor, Scales]:
    """The shared scale of every block, and the blocks after prerounding and flushing.

    `outer` is a tensor scale that was settled before, for blocks that are a part of a tensor.
    """
    options = plan.options
    if options.prerounding is Prerounding.BFLOAT16:
        blocks = preround(blocks, options.rounding)
    if options.flush_subnormals is FlushSubnormals.ELEMENT:
        blocks = torch.where(blocks.abs() < SMALLEST_NORMAL, blocks * 0.0, blocks)
    amax = _largest(blocks.abs(), plan)
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
        poisoned = poisoned | ((block == 0) & _largest(blocks.isinf(), plan))
    return blocks, Scales(block.masked_fill(poisoned, math.nan), outer, zero)


def preround(x: Tensor, rounding: Rounding) -> Tensor:
    """Round to bfloat16, to infinity beyond its largest value, in the type that x has.

    bfloat16 is the upper half of float32: adding half of the lower one rounds half away.
    """
    if rounding in (Rounding.EVEN, Rounding.STOCHASTIC):
        return narrow(x, torch.bfloat16).to(x.dtype)
    bits = (x if x.dtype is torch.float32 else _to_odd(x)).view(torch.int32)
    if rounding is Rounding.AWAY:
        bits = bits + 0x8000
    rounded = bits.bitwise_and(-0x10000).view(torch.float32).to(x.dtype)
    # Truncated bits stop at the largest value, where float64 has larger ones.
    rounded = torch.where(x.abs() >= 2.0**128, x.sign() * math.inf, rounded)
    return torch.where(x.isnan(), x, rounded)


def _finite_amax(blocks: Tensor, amax: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The maximum of the finite values, and the blocks whose NaN the element cannot encode."""
    finite = torch.where(blocks.isfinite(), blocks, 0.0).abs()
    poisoned = torch.zeros_like(amax, dtype=torch.bool)
    return _largest(finite, plan), poisoned if plan.format.element.has_nan else amax.isnan()


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
    dims = _shared(blocks, plan)
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


def whole_range(element: ElementFormat) -> tuple[float, float]:
    """The values of an integer's least and greatest codes."""
    return -math.ldexp(1.0, 1), element.largest


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
    least = finite.amin(_shared(blocks, plan), keepdim=True).clamp(max=0.0)
    greatest = _largest(finite, plan).clamp(min=0.0)
    span = greatest.double() - least.double()
    scale = torch.where(span == 0, 1.0, round_to_grid(span / (high - low), grid)).to(blocks.dtype)
    quotient = least / scale.masked_fill(scale == 0, math.inf)
    steps = (quotient / element.smallest).round() * element.smallest
    zero = torch.where((span == 0) | (scale == 0), 0.0, (low - steps).clamp(low, high))
    return scale, zero


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, by its bits: subnormals of float32 included (int32 in, down to -149)."""
    if dtype is torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    normal = (exponent + 127) << 23
    subnormal = torch.bitwise_left_shift(torch.ones_like(exponent), (exponent + 149).clamp(0, 22))
    return torch.where(exponent >= -126, normal, subnormal).view(torch.float32)


def times(values: Tensor, scales: Scales) -> Tensor:
    """Element values times their scales, rounded once per product (exact for powers of two)."""
    product = values * scales.block
    return product if scales.tensor is None else product * scales.tensor


# ---------------------------------------------------------------- round


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


def round_to_grid(
    x: Tensor,
    element: ElementFormat,
    rounding: Rounding = Rounding.EVEN,
    overflow: Overflow = Overflow.SATURATE,
    words: Tensor | None = None,
) -> Tensor:
    """Round `x` to the element's grid, once, then treat what lies beyond it. NaN stays."""
    spacing = grid_spacing(x, element)
    values = round_to_integer(x / spacing, rounding, words).mul_(spacing)
    if not element.has_negative_zero:
        values.add_(0.0)  # -0 + 0 = +0
    if overflow is Overflow.SATURATE:
        return values.clamp_(element.lowest, element.largest)
    beyond = math.inf if element.has_inf else math.nan
    return torch.where(values.abs() > element.largest, values.sign() * beyond, values)


def grid_spacing(x: Tensor, element: ElementFormat) -> Tensor | float:
    """Distance of neighbours on the grid at |x|: 2^(max(floor(log2|x|), emin) - mantissa bits)."""
    if element.is_integer:
        return math.ldexp(1.0, -element.mantissa_bits)
    bits, exponent_field = (
        (torch.int64, 0x7FF0_0000_0000_0000)
        if x.dtype is torch.float64
        else (torch.int32, 0x7F80_0000)
    )
    power = x.view(bits).bitwise_and(exponent_field).view(x.dtype)
    # The upper bound only concerns values that overflow; it keeps infinity / spacing infinite.
    power.clamp_(math.ldexp(1.0, element.emin), math.ldexp(1.0, element.emax))
    return power.mul_(math.ldexp(1.0, -element.mantissa_bits))


def round_to_integer(x: Tensor, rounding: Rounding, words: Tensor | None = None) -> Tensor:
    """Round to an integer; `words` are 32 random bits an element for stochastic rounding.

    Half away is not trunc(x + 0.5), which errs just below a half.
    """
    if rounding is Rounding.EVEN:
        return x.round()
    whole = x.trunc()
    if rounding is Rounding.ZERO:
        return whole
    if rounding is Rounding.STOCHASTIC:
        assert words is not None
        # The fraction is exact, so is its product with 2^32: only the truncation errs.
        beyond = words < (x - whole).abs().double().mul(2.0**32).long()
        return torch.where(beyond, whole + x.sign(), whole)
    return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)


# ---------------------------------------------------------------- encode


def encode(values: Tensor, element: ElementFormat) -> Tensor:
    """Codes (uint8) of values that lie on the element's grid; NaN that has no code becomes 0."""
    finite = values.nan_to_num(0.0, 0.0, 0.0)
    steps = (finite / (spacing := grid_spacing(finite, element))).to(torch.int32)
    if element.is_integer:
        return steps.bitwise_and(2**element.bits - 1).to(torch.uint8)
    # Counting grid steps from zero: each binade above emin adds 2^mantissa_bits of them.
    assert isinstance(spacing, Tensor)
    binade = torch.frexp(spacing)[1] - 1 + element.mantissa_bits - element.emin
    codes = (binade << element.mantissa_bits) + steps.abs()
    if element.inf_code is not None:
        codes = codes.masked_fill(values.isinf(), element.inf_code)
    negative = values.signbit() if element.has_negative_zero else values < 0
    codes = codes + (negative.int() << element.code_bits)
    return codes.masked_fill(values.isnan(), element.nan_code or 0).to(torch.uint8)


def decode(codes: Tensor, element: ElementFormat, dtype: torch.dtype) -> Tensor:
    """The value of every code, by table."""
    return _table(element, dtype, codes.device)[codes.int()]


@lru_cache(maxsize=256)
def _table(element: ElementFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(element.values, dtype=dtype, device=device)


def encode_scale(values: Tensor, fmt: ScaleFormat) -> Tensor:
    """Stored scales: a code in uint8, an int16 exponent, bfloat16 or float32."""
    if fmt.grid is not None:
        if fmt.bits > 8:
            return values.to(torch.float32 if fmt.bits == 32 else torch.bfloat16)
        return encode(values, fmt.grid)
    assert fmt.exponents is not None
    exponent = torch.frexp(values.nan_to_num(1.0))[1] - 1
    if fmt.is_biased:
        codes = exponent - fmt.exponents[0]
        return codes.masked_fill(values.isnan(), fmt.nan_code).to(torch.uint8)
    return exponent.masked_fill(values.isnan(), UNBOUNDED_NAN).to(torch.int16)


def decode_scale(stored: Tensor, fmt: ScaleFormat, dtype: torch.dtype) -> Tensor:
    """Scale values from their stored form, in `dtype` (float32 or float64)."""
    if fmt.grid is not None:
        return stored.to(dtype) if fmt.bits > 8 else decode(stored, fmt.grid, dtype)
    assert fmt.exponents is not None
    nan, low = (fmt.nan_code, fmt.exponents[0]) if fmt.is_biased else (UNBOUNDED_NAN, 0)
    is_nan = stored == nan
    exponent = stored.to(torch.int32).masked_fill(is_nan, 0 - low) + low
    return power_of_two(exponent, dtype).masked_fill(is_nan, math.nan)


# ---------------------------------------------------------------- pack


def pack(codes: Tensor, bits: int, padding: int) -> Tensor:
    """Pack codes along the last axis into bytes, least significant bit first.

    Two 4-bit codes a byte, low nibble first; four 6-bit codes in three bytes: the stream that
    ONNX, Quark and safetensors share. Rows are padded with zero codes to whole blocks and bytes.
    """
    group = packing_group(bits)
    whole = -(-codes.shape[-1] // padding) * padding
    whole = -(-whole // group) * group
    codes = torch.nn.functional.pad(codes, (0, whole - codes.shape[-1]))
    if bits == 8:
        return codes.contiguous()
    shifts = torch.arange(group, device=codes.device) * bits
    groups: Tensor = codes.unflatten(-1, (-1, group))
    words = (groups.long() << shifts).sum(-1, keepdim=True)
    octets = torch.arange(group * bits // 8, device=codes.device) * 8
    return (words >> octets).bitwise_and(255).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The first `length` codes (uint8) of each packed row."""
    if bits == 8:
        return packed[..., :length]
    group = packing_group(bits)
    octets = torch.arange(group * bits // 8, device=packed.device) * 8
    groups: Tensor = packed.unflatten(-1, (-1, octets.numel()))
    words = (groups.long() << octets).sum(-1, keepdim=True)
    shifts = torch.arange(group, device=packed.device) * bits
    codes = (words >> shifts).bitwise_and(2**bits - 1).to(torch.uint8)
    return codes.flatten(-2)[..., :length]
