"""Linear layers on cast operands, forward and backward, as three matrix products.

Each operand is cast along the reduction axis of its own product, from the values as they came:
forward x w^T along in-features, dgrad g w along out-features, wgrad g^T x along tokens.

On processors with AVX-512 BF16 or AMX, products of float32 tensors whose cast values bfloat16 holds
are multiplied in it, with sums in float32 (docs/numerics.md, section 10): the products of values
are exact either way, the order of the sums is another than PyTorch's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.formats import E8M0, BlockFormat
from microscale.functional.vector import deliver
from microscale.kernels.native import dense
from microscale.operands import Operand
from microscale.ops import ordinary
from microscale.policy import Policy
from microscale.watch import tell_product, watched
from microscale.weights import (
    cast_detached,
    cast_operand,
    cast_values,
    cast_weight,
    forget,
    is_uncast,
    owner,
    straight_through,
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
    work = left.rows * right.rows * left.length
    if work < SMALLEST or min(left.rows, right.rows) < FEWEST:
        return False
    for factor in (left, right):
        x, operand = factor.source, factor.operand
        if operand is None or x.dtype is not torch.float32 or not ordinary(x):
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
    if suits(left, right):
        a, b = left.narrow_values(), right.narrow_values()
        if _exact(left, right, a, b):
            added = None if bias is None else bias.detach().contiguous()
            return dense.multiply(_turned(left, a), _turned(right, b), added), a, b
    a, b = left.values(), right.values()
    return F.linear(_turned(left, a), _turned(right, b), bias), a, b


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


def linear(
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    bias: Tensor | None,
    policy: Policy,
) -> Tensor | None:
    """`torch.nn.functional.linear`, or None where PyTorch's on cast operands does the same.

    That is where bfloat16 gains nothing and the backward pass has no operands of its own.
    """
    if is_uncast() or weight.dim() != 2 or not input.dim() or input.shape[-1] != weight.shape[1]:
        return None
    x, device = input.reshape(-1, input.shape[-1]), input.device.type
    if not _has_own_backward(policy):
        same = bias is None or bias.dtype is input.dtype
        if not same or not suits(*_factors(x, weight, policy)):
            return None
        return _shaped(_run(x, weight, bias, policy), input)
    if not torch.is_autocast_enabled(device):
        return _shaped(_run(x, weight, bias, policy), input)
    # Casts see what there is; the result has the type that autocast wants.
    with torch.autocast(device, enabled=False):
        wide = torch.promote_types(x.dtype, weight.dtype)
        added = None if bias is None else bias.to(wide)
        result = _run(x.to(wide), weight.to(wide), added, policy)
    return _shaped(result.to(torch.get_autocast_dtype(device)), input)


def _has_own_backward(policy: Policy) -> bool:
    dgrad, wgrad = policy.dgrad, policy.wgrad
    return any((dgrad.grad, dgrad.weight, wgrad.input, wgrad.grad))


def _shaped(result: Tensor, input: Tensor) -> Tensor:  # noqa: A002
    return result.reshape(*input.shape[:-1], result.shape[-1])


def _factors(x: Tensor, weight: Tensor, policy: Policy) -> tuple[Factor, Factor]:
    forward = policy.forward
    return Factor(x, forward.input, 1), Factor(weight, forward.weight, 1, weight=True)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _apply(x, weight, bias, policy)
    return _forward(x, weight, bias, policy)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _factors(x, weight, policy)
    result, a, b = multiply(left, right, bias)
    tell_product("matrix", x, a, weight, right.operand, 1)
    return result, a, b


class _Linear(torch.autograd.Function):
    """The three products.

    Without operands of its own, a backward product takes the forward's cast, and the gradient as
    it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, policy: Policy) -> Tensor:
        result, a, b = _forward(x, weight, bias, policy)
        ctx.policy = policy
        of_x, of_weight = ctx.needs_input_grad[:2]
        own_dgrad = policy.dgrad.grad or policy.dgrad.weight
        own_wgrad = policy.wgrad.input or policy.wgrad.grad
        ctx.save_for_backward(
            x if of_weight else None,
            weight if of_x else None,
            None if own_wgrad or not of_weight else a,
            None if own_dgrad or not of_x else b,
        )
        ctx.forgetting = owner(weight)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        policy: Policy = ctx.policy
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _dgrad(grad, weight, b, policy)
        if ctx.needs_input_grad[1]:
            dw = _wgrad(grad, x, a, policy)
            forget([ctx.forgetting])
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db, None


_apply: Callable[[Tensor, Tensor, Tensor | None, Policy], Tensor] = _Linear.apply


def _dgrad(grad: Tensor, weight: Tensor, cast: Tensor | None, policy: Policy) -> Tensor:
    """Gradient of the input: [tokens, out] times [out, in]."""
    if cast is not None:
        return grad @ straight_through(weight, cast.to(grad.dtype))
    left = Factor(grad, policy.dgrad.grad, 1)
    return _product(left, Factor(weight, policy.dgrad.weight, 0, weight=True), policy)


def _wgrad(grad: Tensor, x: Tensor, cast: Tensor | None, policy: Policy) -> Tensor:
    """Gradient of the weight: [tokens, out] transposed times [tokens, in]."""
    if cast is not None:
        return grad.t() @ straight_through(x, cast.to(grad.dtype))
    return _product(Factor(grad, policy.wgrad.grad, 0), Factor(x, policy.wgrad.input, 0), policy)


def _product(left: Factor, right: Factor, policy: Policy) -> Tensor:
    """A product of the backward pass, with gradients where these are asked for (create_graph)."""
    if torch.is_grad_enabled():
        pair = (_turned(f, f.values()) for f in (left, right))
        return deliver(F.linear(*pair), policy)
    return deliver(multiply(left, right)[0], policy)
