"""What the compiled core is told of a call besides where the values lie, kept for calls to come.

A small tensor's cast takes less time than finding out how to walk through it, so each job is made
once for its format, options, types, shapes and strides.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from microscale.formats import BlockFormat, channel_dimension
from microscale.kernels.native.loader import native
from microscale.kernels.native.records import (
    DIMENSIONS,
    TYPES,
    Job,
    PlanRecord,
    plan_record,
    serves,
)
from microscale.kernels.plan import Plan, castable
from microscale.kernels.storage import Shapes, storage_shapes
from microscale.rounding import Options, Rounding, make_options

Shape = Sequence[int]


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A cast that the core computes. Compared by identity, which is quick."""

    format: BlockFormat
    record: PlanRecord
    library: ctypes.CDLL
    whole: str  # the name of a block as long as the data, or ""
    seedless: bool


@lru_cache(maxsize=1024)
def served(fmt: str, *laws: str) -> Served | None:
    """What the core needs for this cast, or None where the reference computes it.

    `laws` are the options by name, in the order of `rounding.LAWS`.

    Raises MicroscaleError for what cannot be cast at all, as `plan` does.
    """
    library = native().library
    options = make_options(*laws)
    block_format = castable(fmt, options)
    if library is None or not serves(block_format, options):
        return None
    record = plan_record(block_format, options)
    seedless = options.rounding is not Rounding.STOCHASTIC
    whole = block_format.block if isinstance(block_format.block, str) else ""
    return Served(block_format, record, library, whole, seedless)


class Prepared(NamedTuple):
    """A job and its address; the job has to live while the core reads it."""

    job: Job
    address: int


class Packing(NamedTuple):
    """The job that packs a tensor, and the shapes of what it writes."""

    job: Job
    address: int
    shapes: Shapes


def _prepared(found: Served, **fields: int) -> Prepared:
    job = Job(**fields)
    job.plan = ctypes.pointer(found.record)
    return Prepared(job, ctypes.addressof(job))


@lru_cache(maxsize=4096)
def cast_job(  # noqa: PLR0917  (the key of the cache: everything a job is made of)
    found: Served,
    axis: int,
    x_type: torch.dtype,
    y_type: torch.dtype,
    threads: int,
    given: int,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Prepared:
    """The job of a cast; `strides` of x and y, or None where both are contiguous."""
    made = _prepared(
        found, threads=threads, x_type=TYPES[x_type], y_type=TYPES[y_type], given=given
    )
    whole = found.whole in ("channel", "tensor")
    if whole or not 0 < len(shape) <= DIMENSIONS or strides is None:
        _set_contiguous(made.job, shape, found.whole, axis)
        return made
    x, y = strides
    index = row_major(shape)
    lanes = _without(shape, axis)
    geometry = made.job.geometry
    geometry.set_lanes(
        lanes,
        x=_without(x, axis),
        y=_without(y, axis),
        index=_without(index, axis),
        scale=row_major(lanes),
    )
    geometry.length = shape[axis]
    geometry.x_axis, geometry.y_axis, geometry.index_axis = x[axis], y[axis], index[axis]
    return made


def _set_contiguous(job: Job, shape: torch.Size, whole: str, axis: int) -> None:
    """Walk through contiguous values as [outer, length, inner], of which length is a block's."""
    values = math.prod(shape)
    outer, length, inner = 1, values, 1
    if whole == "channel" and len(shape) > 1:
        kept = channel_dimension(len(shape), axis)
        length = values // max(shape[kept], 1)
        outer, inner = (shape[0], 1) if kept == 0 else (1, shape[kept])
    elif whole != "tensor" and shape:
        length, inner = shape[axis], math.prod(shape[axis + 1 :])
        outer = math.prod(shape[:axis])
    strides = [length * inner, 1]
    geometry = job.geometry
    geometry.set_lanes([outer, inner], x=strides, y=strides, index=strides, scale=[inner, 1])
    geometry.length = length
    geometry.x_axis = geometry.y_axis = geometry.index_axis = inner


@lru_cache(maxsize=4096)
def quantize_job(
    found: Served,
    axis: int,
    x_type: torch.dtype,
    threads: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Packing:
    """The job that packs a tensor, into contiguous parts."""
    shapes = storage_shapes(shape, Plan(found.format, axis, Options()))
    made = _prepared(found, threads=threads, x_type=TYPES[x_type])
    index = row_major(shape)
    geometry = made.job.geometry
    geometry.set_lanes(
        _without(shape, axis),
        x=_without(strides, axis),
        y=row_major(shapes.codes)[:-1],
        index=_without(index, axis),
        scale=_shared(shapes.scales, row_major(shapes.scales)),
    )
    geometry.length = shape[axis]
    geometry.x_axis, geometry.index_axis = strides[axis], index[axis]
    geometry.scale_axis = 1
    return Packing(*made, shapes)


@lru_cache(maxsize=4096)
def dequantize_job(  # noqa: PLR0917
    found: Served,
    axis: int,
    length: int,
    y_type: torch.dtype,
    threads: int,
    given: int,
    codes: tuple[torch.Size, tuple[int, ...]],
    scales: tuple[torch.Size, tuple[int, ...]],
    y: tuple[int, ...],
) -> Prepared:
    """The job that decodes; shapes and strides of the parts, strides of the values."""
    made = _prepared(found, threads=threads, y_type=TYPES[y_type], given=given)
    geometry = made.job.geometry
    geometry.set_lanes(codes[0][:-1], x=codes[1][:-1], y=_without(y, axis), scale=_shared(*scales))
    geometry.length = length
    geometry.x_axis, geometry.y_axis, geometry.scale_axis = 1, y[axis], scales[1][-1]
    return made


_SCALES = {8: torch.uint8, 16: torch.bfloat16, 32: torch.float32}


@lru_cache(maxsize=4096)
def fits(
    found: Served,
    length: int,
    codes: tuple[torch.dtype, torch.Size],
    scales: tuple[torch.dtype, torch.Size],
    outer: tuple[torch.dtype, torch.Size],
) -> bool:
    """Whether packed parts, by type and shape, fit each other: nothing beside them is read."""
    fmt = found.format
    blocks = -(-length // fmt.block) if isinstance(fmt.block, int) else 1
    lanes = zip(scales[1][:-1], codes[1][:-1], strict=False)
    return (
        codes[0] is torch.uint8
        and scales[0] is _SCALES[fmt.scale.bits]
        and len(codes[1]) == len(scales[1]) <= DIMENSIONS
        and codes[1][-1] * 8 >= length * fmt.element.bits
        and scales[1][-1] >= blocks
        and all(s in (1, c) for s, c in lanes)
        and (fmt.tensor_scale is None or (outer[0] is torch.float32 and outer[1].numel() == 1))
        and math.prod(codes[1]) * length > 0
    )


def row_major(shape: Shape) -> list[int]:
    """Strides of contiguous values."""
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def _without(values: Shape, axis: int) -> list[int]:
    return [value for d, value in enumerate(values) if d != axis]


def _shared(shape: Shape, strides: Shape) -> list[int]:
    """Strides of the lanes' scales: 0 along a dimension that shares them."""
    pairs = zip(shape[:-1], strides[:-1], strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]
