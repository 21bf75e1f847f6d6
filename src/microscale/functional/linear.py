"""Products with one reduction axis: linear layers and matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.functional.product import (
    cast_pair,
    cast_right,
    note_product,
    plain,
    unfit,
)
from microscale.functional.vector import deliver
from microscale.packed_ops import unserved
from microscale.policy import Policy
from microscale.rotation import rotated
from microscale.tensor import BlockTensor
from microscale.watch import tell_product
from microscale.weights import cast_operand


def linear(
    input: Tensor,  # noqa: A002  (the name in torch)
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    policy: Policy,
    name: str = "",
    rotation: int = 0,
) -> Tensor:
    """`torch.nn.functional.linear` on operands cast along in-features.

    Args:
        input: [..., in].
        weight: [out, in]; a BlockTensor is used as it is.
        bias: [out], not cast.
        policy: `forward.input` and `forward.weight` are used.
        name: of the module, for ledgers.
        rotation: how many values of inputs and weights are turned together before their casts
            (`microscale.rotation`); packed weights are stored turned.

    Returns:
        [..., out].
    """
    operands = policy.forward
    note_product(name, "linear", (input, operands.input), (weight, operands.weight))
    with plain():
        left = cast_operand(rotated(input, rotation), operands.input, -1)
        tell_product("matrix", input, left, weight, operands.weight, -1, rotation=rotation)
        if not isinstance(weight, BlockTensor) or unserved(weight):  # else multiplied as stored
            weight = cast_right(weight, operands.weight, -1, rotation)
        return deliver(F.linear(left, weight, bias), policy)


def matmul(left: Tensor, right: Tensor, *, policy: Policy, name: str = "") -> Tensor:
    """`torch.matmul` on operands cast along the dimension that is summed over.

    A parameter (or a view of one) is cast as `forward.weight` and what it is multiplied with as
    `forward.input`; two activations are cast as `matmul.left` and `matmul.right`.
    """
    with plain():
        product = torch.matmul(*cast_pair(left, right, policy=policy, name=name))
        return product if unfit(left, right) else deliver(product, policy)


def addmm(
    input: Tensor,  # noqa: A002
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.addmm`: beta input + alpha (left @ right), the factors cast as `matmul` does."""
    with plain():
        pair = cast_pair(left, right, policy=policy, name=name, product="addmm")
        result = torch.addmm(input, *pair, beta=beta, alpha=alpha)
        return result if unfit(left, right) else deliver(result, policy)
