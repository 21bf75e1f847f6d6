"""Convolutions, cast along channels: the input's dimension 1 and the weight's in-channels.

In a grouped convolution each group sums over its own channels, so no block straddles two groups;
the blocks of a depthwise convolution hold one value. Where the policy says
`convolution = "window"`, blocks run along channels x kernel of one group instead, flattened as the
convolution's matrix product sees them: every window of the input is cast for itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.functional.windows import convolve_windows
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.watch import tell_product
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
    geometry = stride, padding, dilation, groups
    return _convolve(torch.conv1d, (input, weight, bias), geometry, policy, name)


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
    geometry = stride, padding, dilation, groups
    return _convolve(torch.conv2d, (input, weight, bias), geometry, policy, name)


def conv3d(  # noqa: PLR0917
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
    """`torch.nn.functional.conv3d` on operands cast along channels.

    `input` is [N, in, D, H, W] or [in, D, H, W], `weight` [out, in / groups, Q, R, S].
    """
    geometry = stride, padding, dilation, groups
    return _convolve(torch.conv3d, (input, weight, bias), geometry, policy, name)


def run(
    function: Callable[..., Tensor],
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    geometry: tuple[object, ...],
) -> Tensor:
    """Call one of PyTorch's convolutions, unseen by scopes."""
    with plain():
        return function(left, right, bias, *geometry)


def _convolve(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    geometry: tuple[Sizes, Sizes | str, Sizes, int],
    policy: Policy,
    name: str,
) -> Tensor:
    input, weight, bias = tensors  # noqa: A001
    operands, groups = policy.forward, geometry[-1]
    product = f"conv{weight.dim() - 2}d"
    note_product(name, product, (input, operands.input), (weight, operands.weight))
    with plain():
        if policy.convolution == "window" and not (input.shape[1 - weight.dim()] % groups):
            return deliver(convolve_windows(tensors, geometry, operands), policy)
        left = cast_channels(input, operands.input, 1 - weight.dim(), groups)
        tell_product("convolution", input, left, weight, operands.weight, 1, geometry)
        right = cast_right(weight, operands.weight, 1)
        return deliver(run(function, left, right, bias, geometry), policy)


def cast_channels(x: Tensor, operand: Operand | None, axis: int, groups: int) -> Tensor:
    """Cast activations along channels, the blocks of each group anew.

    Tiles span channels and positions, flattened, of one sample.
    """
    if operand is not None and isinstance(operand.format.block, tuple) and axis < -2:
        flat = cast_channels(x.flatten(axis + 1), operand, -2, groups)
        return flat.reshape(x.shape)
    if operand is None or groups == 1 or x.shape[axis] % groups:
        return cast_operand(x, operand, axis)
    apart = x.unflatten(axis, (groups, -1))
    joined: Tensor = cast_operand(apart, operand, axis).flatten(axis - 1, axis)
    return joined
