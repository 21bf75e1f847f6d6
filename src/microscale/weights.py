"""Operands as values: activations are cast at every call, weights once and again when they change.

A cast weight is kept beside the parameter for as long as that lives, in the parameter's own type
or, where a product wants it so, in bfloat16: up to another copy of the weights. A parameter counts
as changed when its version counter moved (every in-place operation that PyTorch tracks: optimizers,
`copy_`, `load_state_dict`), when its memory or type is another (`.to`, `.data = ...`), or when a
gradient has flowed to it (an optimizer's turn is next, and some leave the counter alone).

One thing is not seen: writing into the memory of a parameter through `.data`, NumPy or another
alias without a backward pass before it. Call `forget(model.parameters())` after that.

Compiled code casts weights at every call, since it cannot know when they change.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.weak import WeakTensorKeyDictionary

from microscale.cast import cast
from microscale.operands import Operand
from microscale.rotation import rotated
from microscale.watch import tell

_Place = tuple[Operand, int, torch.dtype, int, torch.Size, tuple[int, ...], int]
_Stamp = tuple[int, int, torch.dtype]

_VIEWS = 16
"""Casts kept of one parameter and its views: code that cuts ever new ones must not fill memory."""


@dataclass(frozen=True, slots=True)
class OwnCast(Operand):
    """An operand that a function casts, given the values and the axis, while a model is trained."""

    caster: Callable[[Tensor, int], Tensor] = field(kw_only=True)


_kept: MutableMapping[Tensor, dict[_Place, tuple[_Stamp, Tensor]]] = WeakTensorKeyDictionary()


def is_weight(x: Tensor) -> bool:
    """Whether `x` is a parameter, a view of one, or marked; other operands are activations."""
    whole = owner(x)
    return isinstance(x, Parameter) or isinstance(whole, Parameter) or hasattr(whole, _GATHERED)


_GATHERED = "microscale_weight"


def mark_weight(x: Tensor) -> Tensor:
    """Have a tensor made of a weight (its rows, its experts) count as one; returns it."""
    setattr(x, _GATHERED, True)
    return x


def owner(x: Tensor) -> Tensor:
    """Return the tensor that `x` is a view of, or `x` itself."""
    base: Tensor | None = x._base  # noqa: SLF001  (torch has no other way to ask)
    return x if base is None else base


_uncast: list[None] = []


@contextmanager
def uncast() -> Iterator[None]:
    """Have nothing cast inside: a converted model runs as if its policy asked for nothing.

    What is stored packed is decoded as ever.
    """
    _uncast.append(None)
    try:
        yield
    finally:
        _uncast.pop()


def is_uncast() -> bool:
    """Whether nothing is to be cast now."""
    return bool(_uncast)


def cast_operand(x: Tensor, operand: Operand | None, axis: int) -> Tensor:
    """Cast `x` along `axis` as `operand` says, straight-through; None leaves it as it is."""
    if operand is None or is_uncast():
        return x
    tell(x, operand, axis, weight=False)
    return cast_values(x, operand, axis)


def cast_values(x: Tensor, operand: Operand, axis: int, dtype: torch.dtype | None = None) -> Tensor:
    """Cast `x` as `cast_operand` does, unseen by watchers."""
    if isinstance(operand, OwnCast):
        return operand.caster(x, axis)
    x = x if operand.factor == 1 else x * operand.factor
    values: Tensor = cast(x, operand.format, axis, dtype=dtype, **operand.laws)
    return values


def cast_weight(weight: Tensor, operand: Operand | None, axis: int, rotation: int = 0) -> Tensor:
    """Cast a weight as `cast_operand` does, once for each state of its parameter.

    With a `rotation` it is turned first, also where it is not cast.
    """
    if operand is None or is_uncast():
        return rotated(weight, rotation, axis)
    if torch.compiler.is_compiling():
        return cast_values(rotated(weight, rotation, axis), operand, axis)
    tell(weight, operand, axis, weight=True)
    parameter = owner(weight)
    # What a function of its own gives may change though the weight does not. And the gradient of
    # what is turned has to be turned back, which autograd does.
    turning = rotation and weight.requires_grad and torch.is_grad_enabled()
    if isinstance(operand, OwnCast) or turning or not _keeps(parameter):
        return cast_values(rotated(weight, rotation, axis), operand, axis)
    value = _keep(parameter, weight, operand, axis, weight.dtype, rotation)
    if weight.requires_grad and torch.is_grad_enabled():
        return _straight_through(weight, value, lambda: forget([parameter]))
    return value


def cast_detached(x: Tensor, operand: Operand, axis: int, dtype: torch.dtype) -> Tensor:
    """The values of a cast in `dtype`, without a gradient; those of a parameter are kept."""
    parameter = owner(x)
    if _keeps(parameter):
        return _keep(parameter, x, operand, axis, dtype)
    return cast_values(x.detach(), operand, axis, dtype)


def _keeps(parameter: Tensor) -> bool:
    return type(parameter) is Parameter and not parameter.is_inference()


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what is kept for these parameters; they are cast again at their next use."""
    for weight in weights:
        _kept.pop(weight, None)


def forget_all() -> None:
    """Drop everything that is kept, of all models."""
    _kept.clear()


def _keep(
    parameter: Tensor,
    weight: Tensor,
    operand: Operand,
    axis: int,
    dtype: torch.dtype,
    rotation: int = 0,
) -> Tensor:
    casts = _kept.get(parameter)
    if casts is None:
        _kept[parameter] = casts = {}
    layout = weight.shape, weight.stride(), int(weight.storage_offset())
    place = (operand, axis, dtype, rotation, *layout)
    stamp = (weight._version, weight.data_ptr(), weight.dtype)  # noqa: SLF001  (autograd's own counter)
    found = casts.get(place)
    if found is not None and found[0] == stamp:
        return found[1]
    # Each expert of a fused weight is a view of its own, and may have two.
    if len(casts) >= max(_VIEWS, 2 * len(parameter) if parameter.dim() > 2 else 0):
        casts.clear()
    # A tensor made in inference mode could not take part in training later.
    with torch.inference_mode(mode=False), torch.no_grad():
        value = cast_values(rotated(weight.detach(), rotation, axis), operand, axis, dtype)
    casts[place] = (stamp, value)
    return value


class _StraightThrough(torch.autograd.Function):
    """The kept value, with the gradient of the weight; a gradient makes it forgotten."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, value: Tensor, forgetting: Callable[[], None]) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.forgetting = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.forgetting()
        return grad, None, None


_straight_through: Callable[[Tensor, Tensor, Callable[[], None]], Tensor] = _StraightThrough.apply


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `x`."""
    return _straight_through(x, value, lambda: None)
