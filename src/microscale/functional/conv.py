"""Convolutions, cast along channels: the input's dimension 1 and the weight's in-channels.

In a grouped convolution each group sums over its own channels, so no block straddles two groups;
the blocks of a depthwise convolution hold one value.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from microscale.functional.product import cast_right, note_product, plain
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.weights import cast_operand

Sizes = int | tuple[int, ...]


def conv1d(  # noqa: PLR0917  (as in torch)
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.conv1d` on operands cast along channels.

    `input` is [N, in, L] or [in, L], `weight` [out, in / groups, K]; `forward.input` and
    `forward.weight` of the policy are used.
    """
    left, right = _cast(input, weight, groups, policy, name)
    return _run(torch.conv1d, left, right, bias, (stride, padding, dilation, groups))


def conv2d(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.conv2d` on operands cast along channels.

    `input` is [N, in, H, W] or [in, H, W], `weight` [out, in / groups, R, S].
    """
    left, right = _cast(input, weight, groups, policy, name)
    return _run(torch.conv2d, left, right, bias, (stride, padding, dilation, groups))


def _run(
    function: Callable[..., Tensor],
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    geometry: tuple[object, ...],
) -> Tensor:
    with plain():
        return function(left, right, bias, *geometry)


def _cast(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    groups: int,
    policy: Policy,
    name: str,
) -> tuple[Tensor, Tensor]:
    operands = policy.forward
    product = f"conv{weight.dim() - 2}d"
    note_product(name, product, (input, operands.input), (weight, operands.weight))
    with plain():
        left = _cast_channels(input, operands.input, 1 - weight.dim(), groups)
        return left, cast_right(weight, operands.weight, 1)


def _cast_channels(x: Tensor, operand: Operand | None, axis: int, groups: int) -> Tensor:
    if operand is None or groups == 1 or x.shape[axis] % groups:
        return cast_operand(x, operand, axis)
    apart = x.unflatten(axis, (groups, -1))
    joined: Tensor = cast_operand(apart, operand, axis).flatten(axis - 1, axis)
    return joined
