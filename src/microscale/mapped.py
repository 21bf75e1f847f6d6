"""The cast inside `torch.func` transforms: each sample of a map is cast for itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import microscale.ops  # noqa: F401  (registers the operators)
from microscale.spelling import get_block_format


def transformed() -> bool:
    """Whether a transform of `torch.func` is active (compiled code has its own way with them)."""
    active: bool = torch._C._are_functorch_transforms_active()  # noqa: SLF001  (as autograd asks)
    return not torch.compiler.is_compiling() and active


def cast_mapped(x: Tensor, *arguments: Any) -> Tensor:
    """`torch.ops.microscale.cast` with a straight-through gradient, for use in transforms."""
    return _apply(x, *arguments)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        values: Tensor = torch.ops.microscale.cast(x, *arguments)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any,  # noqa: ARG004
        in_dims: tuple[Any, ...],
        x: Tensor,
        fmt: str,
        axis: int,
        *rest: Any,
    ) -> tuple[Tensor, int | None]:
        """Cast all samples at once where none shares a scale with another."""
        if in_dims[0] is None:
            return _apply(x, fmt, axis, *rest), None
        samples = x.movedim(in_dims[0], 0)
        block_format = get_block_format(fmt)
        along_axis = isinstance(block_format.block, int) or block_format.block == "token"
        seeded = rest[-1] is not None
        if samples.dim() > 1 and along_axis and block_format.tensor_scale is None and not seeded:
            return _apply(samples, fmt, axis if axis < 0 else axis + 1, *rest), 0
        each = [_apply(sample, fmt, axis, *rest) for sample in samples.unbind(0)]
        return torch.stack(each) if each else samples, 0


_apply: Callable[..., Tensor] = _Cast.apply
