"""Cast, quantize and dequantize by the compiled core: the functions of kernels/reference.py.

The core is told where values lie (pointers, shapes, strides) and what a format is (numbers). Memory
is allocated here. float64 is not served, nor what `records.serves` leaves out.
"""

import ctypes
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from microscale.formats import BlockFormat, channel_dimension
from microscale.kernels.native.loader import native
from microscale.kernels.native.records import DIMENSIONS, TYPES, Job, PlanRecord, plan_record, serves
from microscale.kernels.plan import Plan
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_storage
from microscale.rounding import Options, read_options
from microscale.spelling import get_block_format


class Served(NamedTuple):
    """A cast that the core computes."""

    format: BlockFormat
    record: PlanRecord
    block: object
    library: ctypes.CDLL


@lru_cache(maxsize=1024)
def served(fmt: str, options: str) -> Served | None:
    """What the core needs for this cast, or None where the reference computes it."""
    library = native().library
    block_format, known = get_block_format(fmt), read_options(options)
    if library is None or not serves(block_format, known):
        return None
    record = plan_record(block_format, known)
    return Served(block_format, record, block_format.block, library)


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the core reads values of this type and gives those of `dtype`."""
    return x.dtype in TYPES and (dtype in TYPES or dtype is torch.float64)


# ---------------------------------------------------------------- whole casts


def cast(
    x: Tensor, found: Served, axis: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """Values of `x` on the format's grid, contiguous."""
    if dtype is torch.float64:  # float32 values, which float64 holds
        return cast(x, found, axis, torch.float32, seed).double()
    if not x.is_contiguous() and (isinstance(found.block, str) or x.dim() > DIMENSIONS):
        x = x.contiguous() if found.block != "token" or x.dim() > DIMENSIONS else x
    if x.is_contiguous():
        y = torch.empty_like(x) if dtype is x.dtype else torch.empty_like(x, dtype=dtype)
        cast_contiguous(x, y, found, axis, seed)
        return y
    y = torch.empty(x.shape, dtype=dtype)
    _cast_strided(x, y, found, axis, seed)
    return y


def cast_into(
    x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None = None
) -> None:
    """Write the values to `y`, which has x's shape and may be x itself."""
    in_place = y.data_ptr() == x.data_ptr() and y.dtype is x.dtype and y.stride() == x.stride()
    if y.dtype not in TYPES or (not in_place and _overlap(x, y)) or not _distinct(y):
        y.copy_(cast(x, found, axis, y.dtype, seed))
    elif x.is_contiguous() and y.is_contiguous():
        cast_contiguous(x, y, found, axis, seed)
    elif x.dim() > DIMENSIONS or found.block in ("channel", "tensor"):
        y.copy_(cast(x, found, axis, y.dtype, seed))
    else:
        _cast_strided(x, y, found, axis, seed)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory of two tensors may overlap."""
    (a, b), (c, d) = _span(x), _span(y)
    return a < d and c < b


def _span(x: Tensor) -> tuple[int, int]:
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def _distinct(x: Tensor) -> bool:
    """Whether no two values surely share memory."""
    reached = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return False
            reached += (size - 1) * stride
    return True


def cast_contiguous(x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None) -> None:
    """Cast a contiguous tensor into a contiguous one."""
    shape, block = x.shape, found.block
    values = x.numel()
    if values == 0:
        return
    if block == "tensor" or not shape:
        outer, length, inner = 1, values, 1
    elif block == "channel":
        kept = channel_dimension(len(shape), axis)
        if len(shape) == 1:
            outer, length, inner = 1, values, 1
        elif kept == 0:
            outer, length, inner = shape[0], values // shape[0], 1
        else:
            outer, length, inner = 1, values // shape[kept], shape[kept]
    else:
        length = shape[axis]
        inner = 1 if axis == len(shape) - 1 else math.prod(shape[axis + 1 :])
        outer = values // (length * inner)
    status = found.library.ms_cast_contiguous(
        found.record,
        x.data_ptr(),
        y.data_ptr(),
        TYPES[x.dtype] + 16 * TYPES[y.dtype],
        outer,
        length,
        inner,
        None if seed is None else seed.data_ptr(),
        torch.get_num_threads(),
    )
    if status:
        _fail(status)


def _cast_strided(x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None) -> None:
    """Cast blocks along one axis, wherever the values lie."""
    if x.numel() == 0:
        return
    job = _job(found, x, y, seed)
    rest = [d for d in range(x.dim()) if d != axis]
    index = _row_major(x.shape)
    geometry = job.geometry
    lanes = [x.shape[d] for d in rest]
    geometry.set_lanes(
        lanes,
        x=[x.stride(d) for d in rest],
        y=[y.stride(d) for d in rest],
        index=[index[d] for d in rest],
        scale=_row_major(lanes),
    )
    geometry.length = x.shape[axis]
    geometry.x_axis, geometry.y_axis = x.stride(axis), y.stride(axis)
    geometry.index_axis = index[axis]
    _run(found.library.ms_cast, job)


def quantize(x: Tensor, found: Served, plan: Plan, seed: Tensor | None = None) -> Stored:
    """Packed codes and stored scales of a tensor with values, the block axis last."""
    x = x.reshape(x.shape or (1,))
    axis = plan.axis
    codes, scales, outer = empty_storage(x, plan)
    job = _job(found, x, codes, seed)
    rest = [d for d in range(x.dim()) if d != axis]
    index = _row_major(x.shape)
    geometry = job.geometry
    geometry.set_lanes(
        [x.shape[d] for d in rest],
        x=[x.stride(d) for d in rest],
        y=codes.stride()[:-1],
        index=[index[d] for d in rest],
        scale=_shared_strides(scales),
    )
    geometry.length = x.shape[axis]
    geometry.x_axis, geometry.index_axis = x.stride(axis), index[axis]
    geometry.scale_axis = scales.stride(-1)
    job.scales = scales.data_ptr()
    if outer.numel():
        job.tensor_scale = outer.data_ptr()
    _run(found.library.ms_quantize, job)
    return codes, scales, outer


def dequantize(
    stored: Stored, found: Served, layout: Layout, length: int, dtype: torch.dtype
) -> Tensor:
    """Decoded values, contiguous, with the block axis of `length` values back in its place."""
    if dtype is torch.float64:
        return dequantize(stored, found, layout, length, torch.float32).double()
    codes, scales, outer = stored
    if codes.stride(-1) != 1:
        codes = codes.contiguous()
    shape = decoded_shape(codes, layout.axis, length)
    y = torch.empty(shape, dtype=dtype)
    job = _job(found, codes, y, None)
    rest = [d for d in range(len(shape)) if d != layout.axis]
    geometry = job.geometry
    geometry.set_lanes(
        codes.shape[:-1],
        x=codes.stride()[:-1],
        y=[y.stride(d) for d in rest],
        scale=_shared_strides(scales),
    )
    geometry.length = length
    geometry.x_axis, geometry.y_axis = 1, y.stride(layout.axis)
    geometry.scale_axis = scales.stride(-1)
    job.scales = scales.data_ptr()
    if outer.numel():
        job.tensor_scale = outer.data_ptr()
    _run(found.library.ms_dequantize, job)
    return y


def packs(x: Tensor) -> bool:
    """Whether the core quantizes a tensor of this type and shape."""
    return x.dtype in TYPES and x.numel() > 0 and x.dim() <= DIMENSIONS


def decodes(stored: Stored, found: Served, length: int, compute: torch.dtype) -> bool:
    """Whether the parts fit each other, so that decoding reads nothing beside them."""
    codes, scales, outer = stored
    fmt = found.format
    blocks = -(-length // fmt.block) if isinstance(fmt.block, int) else 1
    lanes = zip(scales.shape[:-1], codes.shape[:-1], strict=False)
    return (
        compute is torch.float32
        and codes.dtype is torch.uint8
        and scales.dtype is _SCALES[fmt.scale.bits]
        and codes.dim() == scales.dim() <= DIMENSIONS
        and codes.shape[-1] * 8 >= length * fmt.element.bits
        and scales.shape[-1] >= blocks
        and all(s in (1, c) for s, c in lanes)
        and (fmt.tensor_scale is None or (outer.numel() == 1 and outer.dtype is torch.float32))
        and math.prod(codes.shape) * length > 0
    )


_SCALES = {8: torch.uint8, 16: torch.bfloat16, 32: torch.float32}

DECODING = str(Options())
"""The options that decoding is looked up with: none matter."""


# ---------------------------------------------------------------- jobs


def _job(found: Served, x: Tensor, y: Tensor, seed: Tensor | None) -> Job:
    job = Job(threads=torch.get_num_threads(), x=x.data_ptr(), y=y.data_ptr())
    job.plan = ctypes.pointer(found.record)
    job.x_type, job.y_type = TYPES.get(x.dtype, 0), TYPES.get(y.dtype, 0)
    if seed is not None:
        job.seed = seed.data_ptr()
    return job


def _row_major(shape: torch.Size | list[int]) -> list[int]:
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def _shared_strides(scales: Tensor) -> list[int]:
    """Strides of the lanes' scales: 0 along a dimension that shares them."""
    pairs = zip(scales.shape[:-1], scales.stride()[:-1], strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def _run(function: "ctypes._FuncPointer", job: Job) -> None:
    status = function(job)
    if status:
        _fail(status)


def _fail(status: int) -> None:
    if status == 1:
        raise MemoryError
    raise AssertionError(f"the compiled core returned {status}")
