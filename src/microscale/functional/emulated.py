"""Linear layers on cast operands whose products run in bfloat16, forward and backward.

Each operand is cast along the reduction axis of its own product, from the values as they came:
forward x w^T along in-features, dgrad g w along out-features, wgrad g^T x along tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microscale.functional.factor import Factor, multiply, suits
from microscale.functional.flow import LINEAR, Backward
from microscale.policy import Policy
from microscale.watch import leave_backward
from microscale.weights import forget, is_uncast, owner, straight_through


def linear(
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    bias: Tensor | None,
    policy: Policy,
    backward: Backward | None,
) -> Tensor | None:
    """`torch.nn.functional.linear`, or None where PyTorch's on cast operands does the same.

    That is where bfloat16 gains nothing, or does not hold the values.
    """
    if is_uncast() or weight.dim() != 2 or not input.dim() or input.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.dtype is not input.dtype:
        return None
    x = input.reshape(-1, input.shape[-1])
    if not suits(*_factors(x, weight, policy)):
        return None
    if backward is not None and backward.of_right.within:
        return None  # samples are seen no more
    wanted = (t is not None and t.requires_grad for t in (x, weight, bias))
    if torch.is_grad_enabled() and any(wanted):
        result = _apply(x, weight, bias, policy, backward)
    else:
        result = multiply(*_factors(x, weight, policy), bias)[0]
    return result.reshape(*input.shape[:-1], result.shape[-1])


def _factors(x: Tensor, weight: Tensor, policy: Policy) -> tuple[Factor, Factor]:
    forward = policy.forward
    return Factor(x, forward.input, 1), Factor(weight, forward.weight, 1, weight=True)


class _Linear(torch.autograd.Function):
    """The three products.

    Without operands of their own, the backward products take the forward's casts, and the gradient
    as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        policy: Policy,
        backward: Backward | None,
    ) -> Tensor:
        result, a, b = multiply(*_factors(x, weight, policy), bias)
        ctx.own = backward
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if of_weight else None,
            weight if of_x else None,
            a if of_weight and backward is None else None,
            b if of_x and backward is None else None,
        )
        ctx.shapes = x.shape, weight.shape
        ctx.forgetting = owner(weight)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _dgrad(grad, weight, b, ctx)
        if ctx.needs_input_grad[1]:
            dw = _wgrad(grad, x, a, ctx)
            forget([ctx.forgetting])
        leave_backward()
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db, None, None


_apply: Callable[[Tensor, Tensor, Tensor | None, Policy, Backward | None], Tensor] = _Linear.apply


def _dgrad(grad: Tensor, weight: Tensor, cast: Tensor | None, ctx: Any) -> Tensor:
    """Gradient of the input: [tokens, out] times [out, in]."""
    if cast is not None:
        return grad @ straight_through(weight, cast.to(grad.dtype))
    ctx.own.begin(ctx.own.of_left)
    return LINEAR.of_left(grad, weight, ctx.shapes[0], ctx.own.of_left)


def _wgrad(grad: Tensor, x: Tensor, cast: Tensor | None, ctx: Any) -> Tensor:
    """Gradient of the weight: [tokens, out] transposed times [tokens, in]."""
    if cast is not None:
        return grad.t() @ straight_through(x, cast.to(grad.dtype))
    ctx.own.begin(ctx.own.of_right)
    return LINEAR.of_right(x, grad, ctx.shapes[1], ctx.own.of_right)
