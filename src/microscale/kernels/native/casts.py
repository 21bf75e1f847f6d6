"""Cast, quantize and dequantize by the compiled core: the functions of kernels/reference/.

The core is told where values lie (pointers, shapes, strides) and what a format is (numbers). Memory
is allocated here. float64 is not served, nor what `records.serves` leaves out.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

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
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_storage
from microscale.rounding import Options, Rounding, make_options


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


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the core reads values of this type and gives those of `dtype`."""
    return x.dtype in TYPES and (dtype in TYPES or dtype is torch.float64)


# ---------------------------------------------------------------- whole casts


def cast(
    x: Tensor, found: Served, axis: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """Values of `x` on the format's grid, contiguous."""
    if x.is_contiguous():
        if dtype is x.dtype:
            y = torch.empty_like(x)
        elif dtype is torch.float64:  # float32 values, which float64 holds
            return cast(x, found, axis, torch.float32, seed).double()
        else:
            y = torch.empty_like(x, dtype=dtype)
    else:
        if found.whole in ("channel", "tensor") or x.dim() > DIMENSIONS:
            return cast(x.contiguous(), found, axis, dtype, seed)
        y = torch.empty(x.shape, dtype=torch.float32 if dtype is torch.float64 else dtype)
    _cast_pair(x, y, found, axis, seed)
    return y if y.dtype is dtype else y.double()


def _cast_pair(
    x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None, *, given: bool = False
) -> None:
    threads = torch.get_num_threads()
    job, address = _cast_job(
        found, axis, x.dtype, y.dtype, threads, given, x.shape, x.stride(), y.stride()
    )  # fmt: skip
    status = found.library.ms_cast(
        address, x.data_ptr(), y.data_ptr(), None if seed is None else seed.data_ptr()
    )
    if status:
        _fail(status)
    del job  # which the call needed


def cast_into(x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None = None) -> Tensor:
    """Write the values to `y`, which has x's shape and may be x itself, and return it."""
    in_place = y.data_ptr() == x.data_ptr() and y.dtype is x.dtype and y.stride() == x.stride()
    contiguous = x.is_contiguous() and y.is_contiguous()
    strided = found.whole not in ("channel", "tensor") and x.dim() <= DIMENSIONS
    apart = in_place or not _overlap(x, y)
    if y.dtype in TYPES and apart and (contiguous or (strided and _distinct(y))):
        _cast_pair(x, y, found, axis, seed, given=True)
        if not y.is_inference():
            torch.autograd.graph.increment_version(y)
    else:
        y.copy_(cast(x, found, axis, y.dtype, seed))
    return y


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


@lru_cache(maxsize=4096)
def _cast_job(  # noqa: PLR0917  (the key of the cache: everything a job is made of)
    found: Served,
    axis: int,
    x_type: torch.dtype,
    y_type: torch.dtype,
    threads: int,
    given: bool,
    shape: torch.Size,
    x: tuple[int, ...],
    y: tuple[int, ...],
) -> tuple[Job, int]:
    """What the core is told of a cast, and the address of that."""
    job = Job(threads=threads, x_type=TYPES[x_type], y_type=TYPES[y_type], given=given)
    job.plan = ctypes.pointer(found.record)
    if found.whole in ("channel", "tensor") or len(shape) in (0, *range(DIMENSIONS + 1, 65)):
        _set_contiguous(job, shape, found.whole, axis)
        return job, ctypes.addressof(job)
    rest = [d for d in range(len(shape)) if d != axis]
    index, lanes = _row_major(shape), [shape[d] for d in rest]
    geometry = job.geometry
    geometry.set_lanes(
        lanes,
        x=[x[d] for d in rest],
        y=[y[d] for d in rest],
        index=[index[d] for d in rest],
        scale=_row_major(lanes),
    )
    geometry.length = shape[axis]
    geometry.x_axis, geometry.y_axis, geometry.index_axis = x[axis], y[axis], index[axis]
    return job, ctypes.addressof(job)


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


def quantize(x: Tensor, found: Served, plan: Plan, seed: Tensor | None = None) -> Stored:
    """Packed codes and stored scales of a tensor with values, the block axis last."""
    x = x.reshape(x.shape or (1,))
    axis = plan.axis
    codes, scales, outer, zero = empty_storage(x, plan)
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
    return codes, scales, outer, zero


def dequantize(
    stored: Stored, found: Served, layout: Layout, length: int, dtype: torch.dtype
) -> Tensor:
    """Decoded values, contiguous, with the block axis of `length` values back in its place."""
    if dtype is torch.float64:
        return dequantize(stored, found, layout, length, torch.float32).double()
    codes, scales, outer, _ = stored
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
    codes, scales, outer, _ = stored
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

DECODING = tuple(str(Options()).split())
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
