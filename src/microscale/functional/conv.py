"""Convolutions, cast along channels: the input's dimension 1 and the weight's in-channels.

In a grouped convolution each group sums over its own channels, so no block straddles two groups;
the blocks of a depthwise convolution hold one value. Where the policy says
`convolution = "window"`, blocks run along channels x kernel of one group instead, flattened as the
convolution's matrix product sees them: every window of the input is cast for itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from microscale.functional.conv_flow import Convolution, cast_channels, check_rotations
from microscale.functional.flow import Backward, backward_of, flow
from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.functional.windows import convolve_windows, each, paddings
from microscale.policy import Policy
from microscale.watch import tell_product

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


def _flowing(
    function: Callable[..., Tensor],
    cast: tuple[Tensor, Tensor, Tensor | None],
    sources: tuple[Tensor, Tensor, Tensor | None],
    geometry: tuple[Sizes, Sizes | str, Sizes, int],
    backward: Backward,
) -> Tensor:
    """Convolve cast operands, with backward products of their own."""
    left, right, bias = cast
    first, weight, _ = sources
    stride, padding, dilation, groups = geometry
    kernel = tuple(weight.shape[2:])
    sides, rest = paddings(padding, dilation, kernel)
    sizes = each(stride, kernel), sides, each(dilation, kernel)
    added = tuple(rest) if any(rest) else ()
    convolution = Convolution(function, (*sizes, groups), *sizes, groups, rest=added)
    alone = first.dim() < weight.dim()
    if alone:
        left, first = left.unsqueeze(0), first.unsqueeze(0)
    result = flow(convolution, left, right, bias, (first, weight), backward)
    return result.squeeze(0) if alone else result


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
            return deliver(convolve_windows(tensors, geometry, policy, name), policy)
        left = cast_channels(input, operands.input, 1 - weight.dim(), groups)
        tell_product("convolution", input, left, weight, operands.weight, 1, geometry)
        right = cast_right(weight, operands.weight, 1)
        backward = backward_of(input, weight, policy, name, product)
        if backward is None:
            return deliver(run(function, left, right, bias, geometry), policy)
        check_rotations(backward)
        return deliver(_flowing(function, (left, right, bias), tensors, geometry, backward), policy)
