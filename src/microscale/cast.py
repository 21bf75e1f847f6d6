"""The verb `cast`: values on a format's grid, with a straight-through gradient."""

import typing
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import microscale.ops  # noqa: F401  (registers the operators)
from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.kernels.plan import FLOATS, plan
from microscale.mapped import cast_mapped, transformed
from microscale.rounding import Gradient, make_options
from microscale.seed import Seed, seed_tensor
from microscale.spelling import get_block_format

Array = NDArray[np.floating]
TensorOrArray = TypeVar("TensorOrArray", Tensor, Array)


def cast(
    x: TensorOrArray,
    fmt: str | BlockFormat,
    axis: int = -1,
    *,
    rounding: str = "even",
    overflow: str = "saturate",
    nonfinite: str = "block",
    flush_subnormals: str = "off",
    prerounding: str = "off",
    gradient: str = "identity",
    seed: Seed = None,
    dtype: torch.dtype | None = None,
    out: TensorOrArray | None = None,
) -> TensorOrArray:
    """Cast `x` to the values of a block format, along `axis`.

    Args:
        x: tensor or NumPy array of any shape, float32, bfloat16, float16 or float64. Float64 is
            computed in float64, the others in float32; power-of-two scales are exact.
        fmt: a block format or its spelling, such as "mxfp4".
        axis: the axis that blocks run along; the reduction axis of the product to come.
        rounding: "even", "away", "zero" or "stochastic".
        overflow: "saturate", or "nonfinite" for elements that have NaN or infinity.
        nonfinite: "block" makes a block that holds NaN or infinity NaN; "element" keeps what the
            element can encode.
        flush_subnormals: "off", "element" (arXiv 2310.10537, Algorithm 1) or "block" (its library).
        prerounding: "off", or "bfloat16" for values that are rounded to bfloat16 first.
        gradient: "identity", or "clipped" for zero where the cast saturates.
        seed: of stochastic rounding: an integer, or an int64 tensor (seed, call, operand[, index
            of x's first element in a sharded tensor]); None draws one from torch's generator.
        dtype: of the result; x's by default. Where it cannot hold a value (float16), IEEE rounding.
        out: a tensor or array of x's shape that receives the result, without a gradient.

    Returns:
        A contiguous tensor of x's shape; for an array, an array.

    Raises:
        MicroscaleError: unknown names, dtypes that are not floats, an axis that does not exist.

    Source: OCP MX v1.0, 6.3; docs/numerics.md states every detail.
    """
    tensor = to_tensor(x)
    target = None if out is None else to_tensor(out, "out")
    to = result_dtype(tensor, dtype, target)
    _check_array_type(x, to)
    spelling = fmt if isinstance(fmt, str) else get_block_format(fmt).name
    laws = (rounding, overflow, nonfinite, flush_subnormals, prerounding)
    options = " ".join(map(str, laws))
    if not torch.compiler.is_compiling():  # compiled code is checked by the fake kernel instead
        plan(tensor, fmt, axis, make_options(*laws))
        Gradient(gradient)
    key = seed_tensor(seed, rounding)
    operator = cast_mapped if transformed() else torch.ops.microscale.cast
    values: Tensor = operator(tensor, spelling, axis, options, to, key)
    if gradient == Gradient.CLIPPED.value and tensor.requires_grad:
        inside = torch.ops.microscale.in_range(tensor.detach(), spelling, axis, options)
        values = torch.where(inside, values, values.detach())
    if target is not None and out is not None:
        write(values, target)
        return out
    return typing.cast("TensorOrArray", _like(values, x))


def _check_array_type(x: object, dtype: torch.dtype) -> None:
    if isinstance(x, np.ndarray) and dtype is torch.bfloat16:
        raise MicroscaleError("dtype torch.bfloat16: NumPy has no such type; give a torch tensor.")


def _like(values: Tensor, x: object) -> object:
    return values.numpy() if isinstance(x, np.ndarray) else values


def write(values: Tensor, out: Tensor) -> Tensor:
    """Copy values into `out`, without a gradient, and return it."""
    with torch.no_grad():
        return out.copy_(values)


def to_tensor(x: object, argument: str = "x") -> Tensor:
    """A tensor as it is, a NumPy array as a tensor that shares its memory where it can."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise MicroscaleError(
            f"{argument} is a {type(x).__name__}; give a torch tensor or a NumPy array."
        )
    if x.dtype not in (np.float16, np.float32, np.float64):
        raise MicroscaleError(
            f"{argument} has dtype {x.dtype}; arrays take float16, float32 or float64. "
            "Convert it first, for example with x.astype('float32')."
        )
    if x.flags.writeable and all(s >= 0 and s % x.itemsize == 0 for s in x.strides):
        return torch.from_numpy(x)
    if argument == "out":
        raise MicroscaleError(
            "out is an array that is read-only or has odd strides; give a new one."
        )
    return torch.from_numpy(x.copy())


def result_dtype(x: Tensor, dtype: torch.dtype | None, out: Tensor | None) -> torch.dtype:
    """The type of a result: as asked for, else that of `out`, else that of `x`."""
    if dtype is not None and dtype not in FLOATS:
        raise MicroscaleError(f"dtype {dtype} is not one of {', '.join(map(str, FLOATS))}.")
    if out is None:
        return dtype or x.dtype
    if out.shape != x.shape or out.dtype not in FLOATS:
        raise MicroscaleError(
            f"out is {out.dtype} of shape {tuple(out.shape)}; it must be a float tensor of shape "
            f"{tuple(x.shape)}."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise MicroscaleError(
            "out is an expanded tensor, whose values share memory; give a new one."
        )
    if dtype not in (None, out.dtype):
        raise MicroscaleError(
            f"dtype {dtype} and out of dtype {out.dtype} disagree; leave one away."
        )
    return out.dtype
