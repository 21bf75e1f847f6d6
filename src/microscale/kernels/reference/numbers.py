"""Single numbers: rounding to a grid, an integer or another type; powers of two by their bits."""

import math

import torch
from torch import Tensor

from microscale.formats import ElementFormat
from microscale.rounding import Overflow, Rounding


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


def whole_range(element: ElementFormat) -> tuple[float, float]:
    """The values of an integer's least and greatest codes."""
    return -math.ldexp(1.0, 1), element.largest


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, by its bits: subnormals of float32 included (int32 in, down to -149)."""
    if dtype is torch.float64:
        return ((exponent.long() + 1023) << 52).view(torch.float64)
    normal = (exponent + 127) << 23
    subnormal = torch.bitwise_left_shift(torch.ones_like(exponent), (exponent + 149).clamp(0, 22))
    return torch.where(exponent >= -126, normal, subnormal).view(torch.float32)


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
