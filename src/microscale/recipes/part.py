"""Weights as the matrices that solvers know, and activations as the rows of their samples.

A product multiplies with a parameter or with a view of one (a third of an attention's projections,
one expert of a fused weight). Such a `Part` is seen as matrices [groups, K, N]: K values of the
input are summed over to N outputs. Within K, columns that share a block stand together: for
convolutions along channels K runs over kernel positions, then channels.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microscale.formats import BlockFormat
from microscale.functional.windows import cut_windows
from microscale.tensor import BlockTensor
from microscale.watch import Kind, Product


@dataclass(frozen=True, slots=True)
class Part:
    """A view of a parameter, and how a product uses it.

    `offset` and `stride` are relative to the parameter's own memory. `geometry` is a convolution's
    in the order in which PyTorch takes it. `rotation`: how many of K values are turned together
    before they are cast.
    """

    parameter: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    kind: Kind
    axis: int
    geometry: tuple[Any, ...] = field(default=(), compare=False)
    rotation: int = 0

    @property
    def groups(self) -> int:
        """How many matrices there are."""
        if self.kind == "transposed convolution":
            return int(self.geometry[3])
        if self.kind in ("convolution", "windows"):
            return int(self.geometry[-1])
        return self.size[0] if len(self.size) > 2 else 1

    @property
    def channels(self) -> int:
        """In-channels of one group of a convolution."""
        return self.size[0] // self.groups if self.axis == 0 else self.size[1]

    @property
    def width(self) -> int:
        """K: how many values of the input are summed over."""
        if "convolution" in self.kind or self.kind == "windows":
            return self.channels * math.prod(self.size[2:])
        return self.size[self.axis]

    @property
    def run(self) -> int:
        """How many columns blocks run along before they begin anew."""
        return self.channels if "convolution" in self.kind else self.width

    def segments(self, fmt: BlockFormat) -> list[int]:
        """Sizes of the runs of columns that share a scale."""
        if not isinstance(fmt.block, int):
            return [self.width]
        once = [min(fmt.block, self.run - start) for start in range(0, self.run, fmt.block)]
        return once * (self.width // self.run)

    def view(self, x: Tensor) -> Tensor:
        """The part of a tensor with the parameter's layout."""
        return x.detach().as_strided(self.size, self.stride, x.storage_offset() + self.offset)

    def matrices(self, view: Tensor) -> Tensor:
        """[groups, K, N] of a view; a copy or not."""
        g = self.groups
        if self.kind == "transposed convolution":
            apart = view.reshape(g, self.channels, view.shape[1], -1)
            return apart.permute(0, 3, 1, 2).reshape(g, self.width, -1)
        if self.kind == "windows":
            return view.reshape(g, -1, self.width).mT
        if self.kind == "convolution":
            apart = view.reshape(g, len(view) // g, self.channels, -1)
            return apart.permute(0, 3, 2, 1).reshape(g, self.width, -1)
        if view.dim() == 1:
            return view[None, :, None]
        whole = view if view.dim() > 2 else view.unsqueeze(0)
        return whole.mT if self.axis == view.dim() - 1 else whole

    def write(self, matrices: Tensor, target: Tensor) -> None:
        """Put matrices into the part's place in a tensor with the parameter's layout."""
        view, g = self.view(target), self.groups
        if self.kind == "transposed convolution":
            apart = matrices.reshape(g, -1, self.channels, matrices.shape[-1])
            view.copy_(apart.permute(0, 2, 3, 1).reshape(self.size))
        elif self.kind == "windows":
            view.copy_(matrices.mT.reshape(self.size))
        elif self.kind == "convolution":
            apart = matrices.reshape(g, -1, self.channels, matrices.shape[-1])
            view.copy_(apart.permute(0, 3, 2, 1).reshape(self.size))
        elif self.axis == view.dim() - 1 and view.dim() > 1:
            view.copy_(matrices.mT.reshape(self.size))
        else:
            view.copy_(matrices.reshape(self.size))

    def rows(self, left: Tensor) -> Tensor:
        """What the product multiplies with, as samples [groups, rows, K] in the order of K."""
        if self.kind == "windows":
            return left.transpose(0, 1).reshape(self.groups, -1, self.width)
        if self.kind == "convolution":
            geometry: Any = self.geometry
            return self._ordered(cut_windows(self._batched(left), self.size, geometry)[0])
        if self.kind == "transposed convolution":
            return self._ordered(self._scattered(self._batched(left)).flip(-1))
        if self.groups > 1:
            return left
        return left.reshape(1, -1, self.width)

    def _batched(self, x: Tensor) -> Tensor:
        return x if x.dim() == len(self.size) else x.unsqueeze(0)

    def _ordered(self, windows: Tensor) -> Tensor:
        """[groups, rows, kernel x channels] of windows [N, groups, places, channels x kernel]."""
        apart = windows.transpose(0, 1).unflatten(-1, (self.channels, -1))
        ordered: Tensor = apart.transpose(-1, -2).reshape(self.groups, -1, self.width)
        return ordered

    def _scattered(self, x: Tensor) -> Tensor:
        """The windows of a transposed convolution, whose kernel comes out reversed.

        It is a convolution of the input with zeros put between its values. Kernels are reversed
        in a flat order within each channel, so that is where they are turned back.
        """
        stride, padding, output_padding, groups, dilation = self.geometry
        kernel = self.size[2:]
        sides: list[int] = []
        each = zip(
            *(_each(s, kernel) for s in (stride, padding, output_padding, dilation)),
            kernel,
            strict=True,
        )
        for axis, (step, pad, extra, gap, size) in enumerate(each, start=2):
            length = x.shape[axis]
            spread = x.new_zeros(*x.shape[:axis], length, step, *x.shape[axis + 1 :])
            spread.select(axis + 1, 0).copy_(x)
            x = spread.flatten(axis, axis + 1).narrow(axis, 0, (length - 1) * step + 1)
            reach = gap * (size - 1)
            sides = [reach - pad, reach - pad + extra, *sides]
        shape = (1, self.channels, *kernel)
        windows, _ = cut_windows(F.pad(x, sides), shape, (1, 0, dilation, groups))
        # Turning channels x kernel around turns the channels too: they are turned here first.
        turned: Tensor = windows.unflatten(-1, (self.channels, -1)).flip(-2).flatten(-2)
        return turned


def _each(size: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One size for each axis."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * len(kernel) if len(sizes) == 1 else sizes


class Parameters:
    """Finds the parameter that a product's weight is (a view of), by where it lies in memory."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        kept = [(n, p) for n, p in named if not isinstance(p, BlockTensor) and p.numel()]
        self.named = dict(kept)
        self._spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, n) for n, p in kept)
        self._found: dict[object, Part | None] = {}

    def part(self, product: Product) -> Part | None:
        """The part that a product multiplies with; None for what is no part of a parameter."""
        weight = product.weight
        if isinstance(weight, BlockTensor):
            return None
        place = weight.data_ptr(), weight.shape, weight.stride()
        key = (*place, product.kind, product.axis, product.rotation)
        if key not in self._found:
            self._found[key] = self._part(product)
        return self._found[key]

    def _part(self, product: Product) -> Part | None:
        weight, address = product.weight, product.weight.data_ptr()
        for start, stop, name in self._spans:
            if start <= address < stop:
                offset = (address - start) // weight.element_size()
                size, stride = tuple(weight.shape), weight.stride()
                use = product.kind, product.axis, product.geometry, product.rotation
                return Part(name, offset, size, stride, *use)
        return None


def solvable(part: Part, left: Tensor) -> bool:
    """Whether the rows of a product can be told: a batch of matrices needs a batch of rows."""
    if part.kind != "matrix" or part.groups == 1:
        return True
    return left.dim() == 3 and len(left) == part.groups


def masked(rows: Tensor, left: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of positions that a mask [N, T] has, where `left` is [N, T, K] or [T, N, K].

    Other activations have no such positions: they are returned whole.
    """
    if mask is None or len(rows) != 1:
        return rows
    places = tuple(left.shape[:-1])
    if places == tuple(mask.shape):
        kept = mask
    elif places == tuple(mask.T.shape):
        kept = mask.T
    elif places == (mask.numel(),):
        kept = mask
    else:
        return rows
    return rows[:, kept.reshape(-1).to(device=rows.device, dtype=torch.bool)]
