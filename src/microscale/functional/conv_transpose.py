"""Transposed convolutions, cast along in-channels: dimension 1 of inputs, 0 of weights.

Each value of the result sums over the in-channels of its group (and some of the kernel), so blocks
run along these and begin anew with each group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from microscale.functional.conv import Sizes, run
from microscale.functional.conv_flow import Convolution, cast_channels, check_rotations
from microscale.functional.flow import backward_of, flow
from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.functional.windows import each
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand


def conv_transpose1d(  # noqa: PLR0917  (as in torch)
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` on operands cast along in-channels.

    `input` is [N, in, L] or [in, L], `weight` [in, out / groups, K]; `forward.input` and
    `forward.weight` of the policy are used.
    """
    geometry = (stride, padding, output_padding, groups, dilation)
    return _convolve(torch.conv_transpose1d, (input, weight, bias), geometry, policy, name)


def conv_transpose2d(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` on operands cast along in-channels.

    `input` is [N, in, H, W] or [in, H, W], `weight` [in, out / groups, R, S].
    """
    geometry = (stride, padding, output_padding, groups, dilation)
    return _convolve(torch.conv_transpose2d, (input, weight, bias), geometry, policy, name)


def conv_transpose3d(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d` on operands cast along in-channels.

    `input` is [N, in, D, H, W] or [in, D, H, W], `weight` [in, out / groups, Q, R, S].
    """
    geometry = (stride, padding, output_padding, groups, dilation)
    return _convolve(torch.conv_transpose3d, (input, weight, bias), geometry, policy, name)


def _convolve(
    function: Callable[..., Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    geometry: tuple[Sizes, Sizes, Sizes, int, Sizes],
    policy: Policy,
    name: str,
) -> Tensor:
    input, weight, bias = tensors  # noqa: A001
    left, right = _cast(input, weight, geometry, policy, name)
    backward = backward_of(input, weight, policy, name, f"conv_transpose{weight.dim() - 2}d")
    if backward is None:
        return deliver(run(function, left, right, bias, geometry), policy)
    check_rotations(backward)
    stride, padding, output_padding, groups, dilation = geometry
    s, p, o, d = (each(x, weight.shape[2:]) for x in (stride, padding, output_padding, dilation))
    convolution = Convolution(
        function, (s, p, o, groups, d), s, p, d, groups, transposed=True, output_padding=o
    )
    alone = input.dim() < weight.dim()
    with plain():
        if alone:
            left, input = left.unsqueeze(0), input.unsqueeze(0)  # noqa: A001
        result = flow(convolution, left, right, bias, (input, weight), backward)
        return deliver(result.squeeze(0) if alone else result, policy)


def _cast(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    geometry: tuple[Sizes, Sizes, Sizes, int, Sizes],
    policy: Policy,
    name: str,
) -> tuple[Tensor, Tensor]:
    operands, groups = policy.forward, geometry[3]
    product = f"conv_transpose{weight.dim() - 2}d"
    note_product(name, product, (input, operands.input), (weight, operands.weight))
    with plain():
        left = cast_channels(input, operands.input, 1 - weight.dim(), groups)
        tell_product("transposed convolution", input, left, weight, operands.weight, 0, geometry)
        if operands.weight is None or isinstance(weight, BlockTensor):
            return left, cast_right(weight, None, 0)
        if weight.shape[0] % groups:
            return left, weight  # which PyTorch refuses in its own words
        return left, _cast_groups(weight, operands.weight, groups)


def _cast_groups(weight: Tensor, operand: Operand, groups: int) -> Tensor:
    """Cast [groups x in, out, ...] along the in-channels of each group.

    Output channels come first meanwhile, since those are what a "channel" is.
    """
    if groups == 1:
        return cast_right(weight.transpose(0, 1), operand, 1).transpose(0, 1)
    apart = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    joined = cast_operand(apart.flatten(0, 1), operand, 1)
    back: Tensor = joined.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return back
