"""A range that is learned: the scales of one operand as a parameter, and their gradients.

The parameter is the step s of LSQ (arXiv 1902.08153): the distance of two neighbouring integers, or
for floats the scale itself, which is what 1 of the element stands for. With v the values,
q = v / s rounded to the grid, and Qn and Qp its ends (127 for INT8, 448 for E4M3),

    dv^/dv = 1 where -Qn < v / s < Qp, else 0
    dv^/ds = q - v / s there, else -Qn or Qp

summed over the values that share a scale and multiplied by g = 1 / sqrt(N Qp), N being the values
that share the scale of a weight, and the features of one sample of an input. The first values seen
settle where it begins: s = 2 mean|v| / sqrt(Qp).

With exponents (arXiv 2208.09225) the number of mantissa bits m is a parameter too, rounded in the
forward pass; the exponent has what is left, and all codes are numbers. With the exponent of each
value held fixed, as the authors' code has it, and M = round(m), E = bits - 1 - M,

    dv^/dm = ln 2 (v^ - v) (ln 2 2^E - 1 - 2^-M / (2 - 2^-M)) inside the range, else 0

and 0 where M was clamped to 1 .. bits - 2 (with one exponent bit or none the grid is uniform). It
is not multiplied by g. What they learn besides, the largest value, is s times the largest element.

The values are those of the reference kernels for the scale s, so the format with that scale settled
gives the same bits.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.formats import FP32, BlockFormat, float_format, settled_scale
from microscale.kernels import reference
from microscale.kernels.plan import Plan
from microscale.kernels.plan import plan as make_plan
from microscale.kernels.reference import Scales
from microscale.kernels.reference.blocks import shared_dimensions
from microscale.kernels.storage import Layout
from microscale.operands import Operand
from microscale.rounding import Options, Rounding, ScaleRule
from microscale.tensor import BlockTensor


def count_scales(x: Tensor, operand: Operand, axis: int) -> int:
    """How many scales a tensor of x's shape has."""
    plan = make_plan(x, operand.format, axis, operand.options)
    blocks = reference.split(torch.empty(x.shape, device="meta"), plan)
    shared = {d % blocks.dim() for d in shared_dimensions(blocks, plan)}
    return math.prod(size for d, size in enumerate(blocks.shape) if d not in shared)


def unlearnable(operand: Operand, *, exponents: bool = False) -> str:
    """Why the scales of an operand cannot be learned, or ""."""
    fmt = operand.format
    if fmt.tensor_scale is not None:
        return f"{fmt} has two scales"
    if fmt.scale != FP32:
        return f"scales of {fmt} are no float32 numbers"
    if operand.options != Options(operand.options.rounding):
        return f"{operand} does more than round"
    if operand.options.rounding is Rounding.STOCHASTIC:
        return "rounding is stochastic"
    if exponents and (fmt.element.is_integer or not 4 <= fmt.element.bits <= 8):
        return f"{fmt.element} has no exponent bits to learn"
    return ""


class LostRangeError(MicroscaleError):
    """A learned scale is not positive and finite any more."""


class LearnedRange(nn.Module):
    """The scales of one operand, of `count` blocks, and with `exponents` its mantissa bits.

    It has no forward: `cast` is what a layer calls. `name` is for errors.
    """

    step: nn.Parameter
    mantissa: nn.Parameter | None
    zero: Tensor
    started: Tensor

    def __init__(
        self, name: str, operand: Operand, count: int, *, weight: bool, exponents: bool = False
    ) -> None:
        super().__init__()
        if reason := unlearnable(operand, exponents=exponents):
            raise MicroscaleError(f"{name}: its range is not learned: {reason}.")
        self.name, self.operand, self.is_weight = name, operand, weight
        self.step = nn.Parameter(torch.ones(count))
        bits = float(operand.format.element.mantissa_bits)
        self.mantissa = nn.Parameter(torch.tensor(bits)) if exponents else None
        self.register_buffer("zero", torch.zeros(count))
        self.register_buffer("started", torch.tensor(data=False))

    @property
    def format(self) -> BlockFormat:
        """The format of the operand, with the exponent bits that are learned now."""
        fmt = self.operand.format
        if self.mantissa is None:
            return fmt
        bits = fmt.element.bits
        kept = min(max(round(float(self.mantissa.detach())), 1), bits - 2)
        return replace(fmt, element=float_format(bits - 1 - kept, kept, "finite"))

    @property
    def unit(self) -> float:
        """What one step is among the element's values: an integer's 1 is k / 2^m of the format."""
        element = self.operand.format.element
        return element.smallest if element.is_integer else 1.0

    def cast(self, x: Tensor, axis: int) -> Tensor:
        """Values of `x` on the grid of the learned scales, in its type and shape.

        Raises MicroscaleError where a scale is not positive any more, and for a first batch that
        is not finite.
        """
        if not x.numel():
            return x
        self._check()
        plan = self._plan(x, axis)
        if not self.started:
            self._start(x, plan)
        return _learn(x, self.step, self.mantissa, self._zero, plan, self._gain(x, plan))

    def packed(self, weight: Tensor, axis: int) -> BlockTensor:
        """The weight as codes, with the scales as they are."""
        plan = self._plan(weight, axis)
        blocks = reference.split(reference.widen(weight, plan.format), plan)
        scales = _scales(blocks, self.step.detach(), self._zero, plan)
        elements = reference.rounded(blocks, scales, plan)
        shape = tuple(weight.shape)
        stored = reference.store(elements, scales, shape, plan)
        return BlockTensor(stored, Layout.of(plan, weight.dtype), weight.shape, weight.dtype)

    def settled(self) -> Operand:
        """The operand with its one scale as a part of its format's name."""
        fmt, zero = self.format, None
        if self._zero is not None:
            lowest, _ = reference.whole_range(fmt.element)
            zero = round((float(self._zero) - lowest) / fmt.element.smallest)
        scale = settled_scale(float(self.step.detach().float()) / self.unit, zero)
        fixed = replace(fmt, scale=scale, rule=ScaleRule.AMAX)
        return replace(self.operand, format=fixed)

    def extra_repr(self) -> str:
        """Describe the operand."""
        return f"{self.operand}, {self.step.numel()} scales"

    @property
    def _zero(self) -> Tensor | None:
        return self.zero if self.operand.format.zero_point else None

    def _plan(self, x: Tensor, axis: int) -> Plan:
        return make_plan(x, self.format, axis, self.operand.options)

    def _check(self) -> None:
        finite = all(bool(p.isfinite().all()) for p in self.parameters())
        if finite and bool((self.step > 0).all()):
            return
        least, most = (float(end) for end in self.step.detach().aminmax())
        raise LostRangeError(
            f"{self.name}: learned steps reach from {least:g} to {most:g}; they must be positive "
            "and finite, so the learning rate of ranges is too high"
        )

    @torch.no_grad()
    def _start(self, x: Tensor, plan: Plan) -> None:
        if not x.isfinite().all():
            bad = int((~x.isfinite()).sum())
            raise MicroscaleError(f"{self.name}: {bad} of the first values are NaN or infinite.")
        blocks = reference.split(reference.widen(x, plan.format), plan)
        if self.operand.format.zero_point:
            scales = reference.scale(blocks, plan)[1]
            assert scales.zero is not None
            self.zero.copy_(scales.zero.flatten())
        mean = blocks.abs().mean(shared_dimensions(blocks, plan)).flatten()
        step = 2 * mean / self._most(plan).sqrt()
        self.step.copy_(torch.where(mean == 0, 1.0, step))
        self.started.fill_(value=True)

    def _most(self, plan: Plan) -> Tensor:
        """Qp for each scale: the farthest end of the grid, in steps."""
        low, high = _ends(plan.format, self._zero)
        ends = torch.as_tensor(high, dtype=torch.float32), torch.as_tensor(low).float().abs()
        return torch.maximum(*ends) / self.unit

    def _gain(self, x: Tensor, plan: Plan) -> Tensor:
        features = x.numel() // self.step.numel() if self.is_weight else x[:1].numel()
        return 1 / (max(features, 1) * self._most(plan)).sqrt()


def _ends(fmt: BlockFormat, zero: Tensor | None) -> tuple[Any, Any]:
    """The least and the greatest element, less the one that stands for zero."""
    element = fmt.element
    if zero is None:
        return element.lowest, element.largest
    low, high = reference.whole_range(element)
    return low - zero, high - zero


def _scales(blocks: Tensor, step: Tensor, zero: Tensor | None, plan: Plan) -> Scales:
    """Steps [count] as scales that broadcast against split blocks."""
    dims = shared_dimensions(blocks, plan)
    dims = tuple(d % blocks.dim() for d in dims)
    shape = [1 if d in dims else n for d, n in enumerate(blocks.shape)]
    element = plan.format.element
    unit = element.smallest if element.is_integer else 1.0
    block = (step.to(blocks.dtype) / unit).reshape(shape)
    return Scales(block, None, None if zero is None else zero.to(blocks.dtype).reshape(shape))


class _Learn(torch.autograd.Function):
    """The cast with given steps; the gradients of the module's text."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        step: Tensor,
        mantissa: Tensor | None,
        zero: Tensor | None,
        plan: Plan,
        gain: Tensor,
    ) -> Tensor:
        blocks = reference.split(reference.widen(x, plan.format), plan)
        scales = _scales(blocks, step.detach(), zero, plan)
        elements = reference.rounded(blocks, scales, plan)
        ctx.save_for_backward(blocks, elements, scales.block, scales.zero, gain, mantissa)
        ctx.plan, ctx.shape, ctx.types = plan, x.shape, (x.dtype, step.dtype)
        values = reference.merge(reference.times(elements, scales), x.shape, plan)
        return reference.narrow(values, x.dtype).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks, elements, scale, zero, gain, mantissa = ctx.saved_tensors
        plan: Plan = ctx.plan
        element = plan.format.element
        whole = reference.split(grad.reshape(ctx.shape or (1,)).to(blocks.dtype), plan)
        quotient = blocks / scale
        low, high = _ends(plan.format, zero)
        inside = (quotient > low) & (quotient < high)
        of_x = reference.merge(torch.where(inside, whole, 0.0), ctx.shape, plan)
        moved = torch.where(inside, elements - quotient, elements)
        unit = element.smallest if element.is_integer else 1.0
        summed = (whole * moved).sum(shared_dimensions(blocks, plan)).flatten() / unit
        of_mantissa = None
        if mantissa is not None:
            error = torch.where(inside, (elements - quotient) * scale, 0.0)
            total = (whole * error).sum() * _mantissa_slope(element.mantissa_bits, element.bits)
            free = 1 <= round(float(mantissa.detach())) <= element.bits - 2
            of_mantissa = (total if free else total * 0).to(mantissa.dtype)
        types = ctx.types
        return of_x.to(types[0]), (summed * gain).to(types[1]), of_mantissa, None, None, None


def _mantissa_slope(mantissa: int, bits: int) -> float:
    """What (v^ - v) is multiplied with in the gradient of m."""
    exponent = bits - 1 - mantissa
    part = 2.0**-mantissa / (2 - 2.0**-mantissa)
    return math.log(2) * (math.log(2) * 2.0**exponent - 1 - part)


_learn: Callable[..., Tensor] = _Learn.apply
