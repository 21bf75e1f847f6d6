"""The shapes and types of a packed tensor's parts, known before any value is."""

from typing import NamedTuple

import torch

from microscale.formats import BlockFormat, ScaleFormat, packed_bytes
from microscale.kernels.plan import Plan

Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Packed codes, scales, tensor scale and zero points (the last two empty where there are none)."""


PARTS = ("codes", "scales", "tensor_scale", "zero_point")
"""Their names."""


class Layout(NamedTuple):
    """How packed parts are to be read.

    Attributes:
        format: the block format.
        axis: the logical axis of the blocks, 0 or more; stored last.
        compute: float64 if the values were, else float32: the type in which a code times a
            real-valued scale is rounded, whatever type the result then gets.
    """

    format: BlockFormat
    axis: int
    compute: torch.dtype

    @classmethod
    def of(cls, plan: Plan, dtype: torch.dtype) -> "Layout":
        """The layout of values of `dtype` that are packed by `plan`."""
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        return cls(plan.format, plan.axis, wide)

    @property
    def spelled(self) -> tuple[str, int, torch.dtype]:
        """The layout as it crosses the boundary of operators."""
        return self.format.name, self.axis, self.compute


def scale_dtype(fmt: ScaleFormat) -> torch.dtype:
    """The torch type that stores one scale."""
    if fmt.stored_bits == 8:
        return torch.uint8
    if fmt.grid is None:
        return torch.int16
    return torch.float32 if fmt.bits == 32 else torch.bfloat16


class Shapes(NamedTuple):
    """The shapes of a packed tensor's parts, and the type of its scales."""

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    tensor_scale: tuple[int, ...]
    zero_point: tuple[int, ...]
    scale_dtype: torch.dtype


def storage_shapes(shape: tuple[int, ...], plan: Plan) -> Shapes:
    """The shapes of the parts of a tensor of `shape` packed by `plan`, the block axis last."""
    fmt, shape = plan.format, tuple(shape) or (1,)
    length, rest = shape[plan.axis], shape[: plan.axis] + shape[plan.axis + 1 :]
    codes = (*rest, packed_bytes(length, fmt.element.bits, fmt.padding))
    outer = 0 if fmt.tensor_scale is None else 1
    shared = _scale_shape(shape, plan)
    zero_point = shared if fmt.zero_point else (0,)
    return Shapes(codes, shared, (outer,), zero_point, scale_dtype(fmt.scale))


def empty_parts(shapes: Shapes, device: torch.device) -> Stored:
    """Uninitialised parts."""
    codes, scales, outer, zero_point, dtype = shapes
    return (
        torch.empty(codes, dtype=torch.uint8, device=device),
        torch.empty(scales, dtype=dtype, device=device),
        torch.empty(outer, dtype=torch.float32, device=device),
        torch.empty(zero_point, dtype=torch.int8, device=device),
    )


def empty_storage(x: torch.Tensor, plan: Plan) -> Stored:
    """Uninitialised parts for `x`, the block axis last."""
    return empty_parts(storage_shapes(tuple(x.shape), plan), x.device)


def _scale_shape(shape: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    block = plan.format.block
    if isinstance(block, tuple):
        blocks = -(-shape[plan.axis] // block[1])
        rows = plan.rows(len(shape))
        shape = tuple(-(-n // block[0]) if d == rows else n for d, n in enumerate(shape))
    elif isinstance(block, int):
        blocks = -(-shape[plan.axis] // block)
    else:
        blocks = 1
        reduced = plan.reduced(len(shape))
        shape = tuple(1 if d in reduced else size for d, size in enumerate(shape))
    return (*shape[: plan.axis], *shape[plan.axis + 1 :], blocks)


def decoded_shape(codes: torch.Tensor, axis: int, length: int) -> tuple[int, ...]:
    """The logical shape of packed codes whose block axis, stored last, belongs at `axis`."""
    rest = codes.shape[:-1]
    return (*rest[:axis], length, *rest[axis:])
