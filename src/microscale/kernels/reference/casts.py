"""Whole casts: scale, round, encode, pack."""

import math

import torch
from torch import Tensor

from microscale.formats import BlockFormat
from microscale.kernels.plan import Plan
from microscale.kernels.reference.blocks import (
    gather_shared,
    merge,
    split,
    spread_shared,
    widen,
    working,
)
from microscale.kernels.reference.codes import (
    decode,
    decode_scale,
    encode,
    encode_scale,
    pack,
    unpack,
)
from microscale.kernels.reference.elements import Scales, random_like, rounded, times
from microscale.kernels.reference.numbers import narrow, whole_range
from microscale.kernels.reference.scales import scale
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_storage


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
