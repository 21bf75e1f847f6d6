"""A convolution as the matrix product that it is: windows of the input times the weight.

The windows of one group are rows of channels x kernel values, which blocks run along.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.functional.flow import MATMUL, backward_of, flow
from microscale.functional.product import cast_right
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand

Sizes = int | tuple[int, ...]
Geometry = tuple[Sizes, Sizes | str, Sizes, int]
Padding = tuple[tuple[int, ...], list[int]]


def convolve_windows(
    tensors: tuple[Tensor, Tensor, Tensor | None], geometry: Geometry, policy: Policy, name: str
) -> Tensor:
    """Convolve `input` [N, in, ...] or [in, ...] with `weight` [out, in / groups, ...].

    `geometry` is stride, padding, dilation and groups, as PyTorch takes them.
    """
    input, weight, bias = tensors  # noqa: A001
    if input.dim() < weight.dim():
        alone = input.unsqueeze(0), weight, bias
        return convolve_windows(alone, geometry, policy, name).squeeze(0)
    groups, operands = geometry[-1], policy.forward
    windows, places = cut_windows(input, weight.shape, geometry)
    left = cast_operand(windows, operands.input, -1)
    tell_product("windows", windows, left, weight, operands.weight, 1, geometry)
    backward = backward_of(windows, weight, policy, name, f"conv{weight.dim() - 2}d")
    if isinstance(weight, BlockTensor):
        weight = weight.dequantize()
        operands = replace(operands, weight=None)
    kernels = cast_right(weight.flatten(1), operands.weight, 1)
    right, matrices = (x.unflatten(0, (groups, -1)).mT for x in (kernels, weight.flatten(1)))
    if backward:
        # Groups first: batch and positions are what the gradient of a weight sums over.
        left, windows = (x.transpose(0, 1).flatten(1, 2) for x in (left, windows))
        product = flow(MATMUL, left, right, None, (windows, matrices), backward)
        product = product.unflatten(1, (len(input), -1)).transpose(0, 1)
    else:
        product = torch.matmul(left, right)
    result = product.permute(0, 1, 3, 2).reshape(len(input), -1, *places)
    return result if bias is None else result + bias.view(-1, *[1] * len(places))


def cut_windows(x: Tensor, shape: Sequence[int], geometry: Geometry) -> tuple[Tensor, list[int]]:
    """The windows [N, groups, places, channels x kernel] of x [N, channels, ...], and the places.

    `shape` is that of the weight, [out, in / groups, ...].
    """
    stride, padding, dilation, groups = geometry
    kernel = tuple(shape[2:])
    strides, dilations = each(stride, kernel), each(dilation, kernel)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    sides, rest = paddings(padding, dilation, kernel)
    x = F.pad(x, [p for side in reversed(sides) for p in (side, side)])
    x = F.pad(x, rest)
    for i, (r, step) in enumerate(zip(reach, strides, strict=True)):
        x = x.unfold(2 + i, r + 1, step)
    every: Any = (..., *(slice(None, None, d) for d in dilations))
    x = x[every]
    n = len(kernel)
    places = list(x.shape[2 : 2 + n])
    apart = x.unflatten(1, (groups, -1)).movedim(2, 2 + n)
    return apart.reshape(len(x), groups, math.prod(places), math.prod(shape[1:])), places


def paddings(padding: Sizes | str, dilation: Sizes, kernel: tuple[int, ...]) -> Padding:
    """What is added on both sides of each axis, and what `F.pad` is to add on the right alone.

    "same" of an even reach adds one more on the right, as PyTorch does.
    """
    if not isinstance(padding, str):
        return each(padding, kernel), [0] * 2 * len(kernel)
    if padding != "same":
        return (0,) * len(kernel), [0] * 2 * len(kernel)
    reach = [d * (k - 1) for d, k in zip(each(dilation, kernel), kernel, strict=True)]
    odd = [part for r in reversed(reach) for part in (0, r % 2)]
    return tuple(r // 2 for r in reach), odd


def each(size: Sizes, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One size for each axis; PyTorch takes one for all, as a number or as a list of one."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * len(kernel) if len(sizes) == 1 else sizes
