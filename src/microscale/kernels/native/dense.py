"""Products of matrices in bfloat16 with sums in float32, by the compiled core.

They serve float32 layers whose operands were cast to narrow formats: values that bfloat16 holds
have products that float32 holds. docs/numerics.md, section 10, says how sums are made.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from microscale.kernels.native.loader import native
from microscale.kernels.native.records import TYPES


class Dense(ctypes.Structure):
    """ms_dense."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("step", ctypes.c_int64),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    library = native().library
    if library is None:
        return None
    dense, pointer, size = ctypes.POINTER(Dense), ctypes.c_void_p, ctypes.c_int64
    number = ctypes.c_int
    library.ms_matmul.argtypes = [dense, dense, size, pointer, pointer, number, number]
    library.ms_extent.argtypes = [pointer, number, size, number, pointer]
    return library


def available() -> bool:
    """Whether the instruction set in use multiplies bfloat16."""
    library = _library()
    return library is not None and bool(library.ms_has_matmul())


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Left [M, K] times right [N, K] transposed, plus bias [N], in float32.

    The factors are in bfloat16 without subnormals, each contiguous as it is or transposed; the bias
    is in float32 and contiguous. Ask `available` before.
    """
    library = _library()
    assert library is not None
    out = torch.empty((left.shape[0], right.shape[0]))
    status = library.ms_matmul(
        _record(left),
        _record(right),
        left.shape[1],
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        TYPES[out.dtype],
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError
    return out


def _record(x: Tensor) -> Dense:
    rows, step = x.stride()
    if x.shape[1] == 1:  # a stride over one value may be anything
        step = 1
    return Dense(x.data_ptr(), x.shape[0], rows, TYPES[x.dtype], step)


def extent(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest finite magnitude of a contiguous tensor, zeros apart.

    Infinity and 0 where there are none. For float32 and bfloat16; ask `available` before.
    """
    library = _library()
    assert library is not None
    two = (ctypes.c_float * 2)()
    library.ms_extent(x.data_ptr(), TYPES[x.dtype], x.numel(), torch.get_num_threads(), two)
    return two[0], two[1]
