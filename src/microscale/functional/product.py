"""The two operands of a product: their roles, their casts, and the note about it."""

from dataclasses import replace

import torch
from torch import Tensor

from microscale.ledger import How, note, recording
from microscale.operands import Operand
from microscale.packed_ops import unserved
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand, cast_weight, is_weight

plain = torch._C.DisableTorchFunction  # noqa: SLF001  (named in torch's notes on extending)
"""Context in which products are PyTorch's own: no scope sees them to cast operands again."""


def cast_pair(
    left: Tensor,
    right: Tensor,
    *,
    policy: Policy,
    name: str = "",
    product: str = "matmul",
    owners: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cast the factors of `left @ right` along the dimension that is summed over, and note it.

    A parameter, a view of one and a packed tensor are weights; two activations are cast as
    `policy.matmul` says. What cannot be cast (integers, sparse tensors, outer products, in which
    nothing is summed) is returned as it came, and noted with the reason. `owners` are what the
    factors were made of, if that says more than they do.
    """
    reason = unfit(left, right)
    if reason:
        note(name, product, "skipped", (None, None), reason)
        return left, right
    first, second = owners or (left, right)
    operands = _operands(first, second, policy)
    note_product(name, product, (first, operands[0]), (second, operands[1]))
    axis = -2 if right.dim() > 1 else -1
    a, b = _decoded(left, first, operands[0], -1), _decoded(right, second, operands[1], axis)
    if is_weight(right) and not is_weight(left):
        tell_product("matrix", left, a, right, operands[1], axis)
    elif is_weight(left) and not is_weight(right):
        source, rows = (x.mT if x.dim() > 1 else x for x in (right, b))
        tell_product("matrix", source, rows, left, operands[0], -1)
    return a, b


def note_product(
    name: str,
    product: str,
    left: tuple[Tensor, Operand | None],
    right: tuple[Tensor, Operand | None],
) -> None:
    """Note a product of two tensors and their operands as packed, emulated or skipped."""
    if not recording():
        return
    formats = _format(*left), _format(*right)
    packed = isinstance(left[0], BlockTensor) or isinstance(right[0], BlockTensor)
    how: How = "packed" if packed else "skipped" if formats == (None, None) else "emulated"
    reason = _decoding(product, right[0]) if packed else UNSET if how == "skipped" else ""
    note(name, product, how, formats, reason)


def _decoding(product: str, weight: Tensor) -> str:
    """Why a product of a packed weight decodes it first, or "" where it reads the storage."""
    if product in ("embedding", "embedding_bag"):  # which take rows
        return ""
    if product != "linear" or not isinstance(weight, BlockTensor):
        return "decoded first"
    why = unserved(weight)
    return f"decoded first: {why}" if why else ""


UNSET = "the policy leaves both operands in the wider type"


def cast_right(weight: Tensor, operand: Operand | None, axis: int, rotation: int = 0) -> Tensor:
    """Cast a weight by its role, whatever it is; a packed tensor, stored turned, is decoded."""
    if isinstance(weight, BlockTensor):
        return weight.dequantize()
    return cast_weight(weight, operand, axis, rotation)


def _decoded(x: Tensor, owner: Tensor, operand: Operand | None, axis: int) -> Tensor:
    """Cast a factor, unless it was decoded from a packed tensor."""
    if isinstance(owner, BlockTensor) and x is not owner:
        return x
    return cast_factor(x, operand, axis)


def cast_factor(x: Tensor, operand: Operand | None, axis: int) -> Tensor:
    """Cast a factor by its role: a weight and its views once, activations at every call."""
    return _cast(x, of_matrices(operand) if x.dim() != 2 else operand, axis)


def of_matrices(operand: Operand | None) -> Operand | None:
    """What one scale per output channel is to each of several matrices, and to a vector."""
    if operand is None or operand.format.block != "channel":
        return operand
    return replace(operand, format=replace(operand.format, block="token"))


def _cast(x: Tensor, operand: Operand | None, axis: int) -> Tensor:
    if is_weight(x) or isinstance(x, BlockTensor):
        return cast_right(x, operand, axis)
    return cast_operand(x, operand, axis)


def _format(x: Tensor, operand: Operand | None) -> object:
    if isinstance(x, BlockTensor):
        return x.format
    return operand


def _operands(left: Tensor, right: Tensor, policy: Policy) -> tuple[Operand | None, Operand | None]:
    weights = [is_weight(x) or isinstance(x, BlockTensor) for x in (left, right)]
    if not any(weights):
        return policy.matmul.left, policy.matmul.right
    first, second = (policy.forward.weight if w else policy.forward.input for w in weights)
    return first, second


def unfit(left: Tensor, right: Tensor) -> str:
    """Why the factors of `left @ right` are not cast, or ""."""
    if reason := uncastable(left, right):
        return reason
    if left.dim() and left.shape[-1] == 1 and not (is_weight(left) or is_weight(right)):
        return "an outer product sums nothing"
    return ""


def uncastable(left: Tensor, right: Tensor) -> str:
    """Why two tensors cannot be cast, or ""."""
    for x in (left, right):
        if not x.is_floating_point():
            return f"operands of {x.dtype} are not cast"
        if x.layout is not torch.strided or x.is_nested:
            return "sparse and nested operands are not cast"
    return ""
