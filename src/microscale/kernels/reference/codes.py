"""Codes of elements and scales, and their packing into bytes."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from microscale.formats import ElementFormat, ScaleFormat, packing_group
from microscale.kernels.reference.numbers import grid_spacing, power_of_two

UNBOUNDED_NAN = -(2**15)  # the int16 that stands for a NaN scale without a bound


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
