"""Cast, quantize and dequantize by the compiled core: the functions of kernels/reference.

The core is told where values lie (pointers, shapes, strides) and what a format is (numbers). Memory
is allocated here. float64 is not served, nor what `records.serves` leaves out.
"""

import torch
from torch import Tensor

from microscale.kernels.native.jobs import (
    Served,
    cast_job,
    dequantize_job,
    fits,
    quantize_job,
    served,
)
from microscale.kernels.native.records import DIMENSIONS, TYPES
from microscale.kernels.storage import Layout, Stored, decoded_shape, empty_parts
from microscale.rounding import Options

__all__ = ["DECODING", "Served", "served"]

DECODING = tuple(str(Options()).split())
"""The options that decoding is looked up with: none matter."""


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the core reads values of this type and gives those of `dtype`."""
    return x.dtype in TYPES and (dtype in TYPES or dtype is torch.float64)


def cast(
    x: Tensor, found: Served, axis: int, dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """Values of `x` on the format's grid, contiguous."""
    if dtype is x.dtype and x.is_contiguous():  # the usual case, in as few steps as can be
        y = torch.empty_like(x)
        _, address = cast_job(found, axis, dtype, dtype, torch.get_num_threads(), 0, x.shape)
        pointer = None if seed is None else seed.data_ptr()
        if status := found.library.ms_cast(address, x.data_ptr(), y.data_ptr(), pointer):
            _check(status)
        return y
    if dtype is torch.float64:  # float32 values, which float64 holds
        return cast(x, found, axis, torch.float32, seed).double()
    if not x.is_contiguous() and not _walks(x, found):
        return cast(x.contiguous(), found, axis, dtype, seed)
    y = torch.empty(x.shape, dtype=dtype)
    _cast_pair(x, y, found, axis, seed)
    return y


def _walks(x: Tensor, found: Served) -> bool:
    """Whether the core walks through values that do not lie behind each other."""
    return found.whole not in ("channel", "tensor") and x.dim() <= DIMENSIONS


def _cast_pair(
    x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None, *, given: bool = False
) -> None:
    near = x.is_contiguous() and y.is_contiguous()
    strides = None if near else (x.stride(), y.stride())
    job = cast_job(
        found, axis, x.dtype, y.dtype, torch.get_num_threads(), int(given), x.shape, strides
    )  # fmt: skip
    pointer = None if seed is None else seed.data_ptr()
    _check(found.library.ms_cast(job.address, x.data_ptr(), y.data_ptr(), pointer))


def cast_into(x: Tensor, y: Tensor, found: Served, axis: int, seed: Tensor | None = None) -> Tensor:
    """Write the values to `y`, which has x's shape and may be x itself, and return it."""
    if y.dtype in TYPES and _apart(x, y) and _writable(y, found) and _readable(x, found):
        _cast_pair(x, y, found, axis, seed, given=True)
        written(y)
    else:
        y.copy_(cast(x, found, axis, y.dtype, seed))
    return y


def written(y: Tensor) -> None:
    """Tell autograd that values changed."""
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)


def _readable(x: Tensor, found: Served) -> bool:
    return x.is_contiguous() or _walks(x, found)


def _writable(y: Tensor, found: Served) -> bool:
    return y.is_contiguous() or (_walks(y, found) and _distinct(y))


def _apart(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors share no memory, or all of it, value by value."""
    if y.data_ptr() == x.data_ptr() and y.dtype is x.dtype and y.stride() == x.stride():
        return True
    (a, b), (c, d) = _span(x), _span(y)
    return b <= c or d <= a


def _span(x: Tensor) -> tuple[int, int]:
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.itemsize if x.numel() else start


def _distinct(x: Tensor) -> bool:
    """Whether no two values surely share memory."""
    reached = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reached:
                return False
            reached += (size - 1) * stride
    return True


def packs(x: Tensor) -> bool:
    """Whether the core quantizes a tensor of this type and shape."""
    return x.dtype in TYPES and x.numel() > 0 and x.dim() <= DIMENSIONS


def quantize(x: Tensor, found: Served, axis: int, seed: Tensor | None = None) -> Stored:
    """Packed codes and stored scales of a tensor with values, the block axis last."""
    shape, strides = (x.shape, x.stride()) if x.dim() else ((1,), (1,))
    job = quantize_job(found, axis, x.dtype, torch.get_num_threads(), shape, strides)
    stored = empty_parts(job.shapes, x.device)
    codes, scales, outer, _ = stored
    parts = codes.data_ptr(), scales.data_ptr(), outer.data_ptr()
    pointer = None if seed is None else seed.data_ptr()
    _check(found.library.ms_quantize(job.address, x.data_ptr(), *parts, pointer))
    return stored


def quantize_both(
    x: Tensor, found: Served, axes: tuple[int, int], seed: Tensor | None = None
) -> tuple[Stored, Stored]:
    """The parts along each of two axes; of neighbouring axes x is read once."""
    if abs(axes[0] - axes[1]) != 1:
        return quantize(x, found, axes[0], seed), quantize(x, found, axes[1], seed)
    threads = torch.get_num_threads()
    first, second = (
        quantize_job(found, axis, x.dtype, threads, x.shape, x.stride()) for axis in axes
    )
    made = empty_parts(first.shapes, x.device), empty_parts(second.shapes, x.device)
    parts = [part.data_ptr() for stored in made for part in stored[:3]]
    pointer = None if seed is None else seed.data_ptr()
    call = found.library.ms_quantize_both
    _check(call(first.address, second.address, x.data_ptr(), *parts, pointer))
    return made


def dequantize(
    stored: Stored,
    found: Served,
    layout: Layout,
    length: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Decoded values with the block axis of `length` values back in its place.

    They are contiguous, or written to an `out` that `receives` them.
    """
    if dtype is torch.float64:
        return dequantize(stored, found, layout, length, torch.float32).double()
    codes, scales, outer, _ = stored
    if codes.stride(-1) != 1:
        codes = codes.contiguous()
    y = torch.empty(decoded_shape(codes, layout.axis, length), dtype=dtype) if out is None else out
    job = dequantize_job(
        found, layout.axis, length, dtype, torch.get_num_threads(), int(out is not None),
        (codes.shape, codes.stride()), (scales.shape, scales.stride()), y.stride() or (1,),
    )  # fmt: skip
    _check(
        found.library.ms_dequantize(
            job.address, codes.data_ptr(), scales.data_ptr(), outer.data_ptr(), y.data_ptr()
        )
    )
    return y


def receives(out: Tensor, stored: Stored) -> bool:
    """Whether decoded values may be written to `out` at once."""
    distinct = out.is_contiguous() or _distinct(out)
    return out.dtype in TYPES and distinct and all(_apart(part, out) for part in stored[:3])


def decodes(stored: Stored, found: Served, length: int, compute: torch.dtype) -> bool:
    """Whether the parts fit each other, so that decoding reads nothing beside them."""
    codes, scales, outer, _ = stored
    return compute is torch.float32 and fits(
        found, length,
        (codes.dtype, codes.shape), (scales.dtype, scales.shape), (outer.dtype, outer.shape),
    )  # fmt: skip


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError
    if status:
        raise AssertionError(f"the compiled core returned {status}")
