"""A convolution as the matrix product that it is: windows of the input times the weight.

The windows of one group are rows of channels x kernel values, which blocks run along.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.functional.product import cast_right
from microscale.operands import Forward
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand

Sizes = int | tuple[int, ...]
Geometry = tuple[Sizes, Sizes | str, Sizes, int]


def convolve_windows(
    tensors: tuple[Tensor, Tensor, Tensor | None], geometry: Geometry, operands: Forward
) -> Tensor:
    """Convolve `input` [N, in, ...] or [in, ...] with `weight` [out, in / groups, ...].

    `geometry` is stride, padding, dilation and groups, as PyTorch takes them.
    """
    input, weight, bias = tensors  # noqa: A001
    if input.dim() < weight.dim():
        return convolve_windows((input.unsqueeze(0), weight, bias), geometry, operands).squeeze(0)
    groups = geometry[-1]
    windows, places = cut_windows(input, weight.shape, geometry)
    left = cast_operand(windows, operands.input, -1)
    tell_product("windows", windows, left, weight, operands.weight, 1, geometry)
    if isinstance(weight, BlockTensor):
        weight = weight.dequantize()
        operands = replace(operands, weight=None)
    kernels = cast_right(weight.flatten(1), operands.weight, 1)
    right = kernels.unflatten(0, (groups, -1)).mT
    result = torch.matmul(left, right).permute(0, 1, 3, 2).reshape(len(input), -1, *places)
    return result if bias is None else result + bias.view(-1, *[1] * len(places))


def cut_windows(x: Tensor, shape: Sequence[int], geometry: Geometry) -> tuple[Tensor, list[int]]:
    """The windows [N, groups, places, channels x kernel] of x [N, channels, ...], and the places.

    `shape` is that of the weight, [out, in / groups, ...].
    """
    stride, padding, dilation, groups = geometry
    kernel = tuple(shape[2:])
    strides, dilations = _each(stride, kernel), _each(dilation, kernel)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    if isinstance(padding, str):
        sides = [(r // 2, r - r // 2) if padding == "same" else (0, 0) for r in reach]
    else:
        sides = [(p, p) for p in _each(padding, kernel)]
    x = F.pad(x, list(chain.from_iterable(reversed(sides))))
    for i, (r, step) in enumerate(zip(reach, strides, strict=True)):
        x = x.unfold(2 + i, r + 1, step)
    every: Any = (..., *(slice(None, None, d) for d in dilations))
    x = x[every]
    n = len(kernel)
    places = list(x.shape[2 : 2 + n])
    apart = x.unflatten(1, (groups, -1)).movedim(2, 2 + n)
    return apart.reshape(len(x), groups, math.prod(places), math.prod(shape[1:])), places


def _each(size: Sizes, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One size for each axis; PyTorch takes one for all, as a number or as a list of one."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * len(kernel) if len(sizes) == 1 else sizes
