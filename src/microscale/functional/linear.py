"""Products with one reduction axis: linear layers and matrix products."""

import torch
from torch import Tensor

from microscale.functional import emulated
from microscale.functional.flow import LINEAR, add_product, backward_of, flow, multiply
from microscale.functional.product import cast_right, note_product, plain, unfit
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
        policy: `forward.input` and `forward.weight` are used; the gradients' products use `dgrad`
            and `wgrad`, cast along out-features and along all tokens, flattened. Where none of
            their operands is set, they take the gradient as it is and the forward's casts.
        name: of the module, for ledgers.
        rotation: how many values of inputs and weights are turned together before their casts
            (`microscale.rotation`); packed weights are stored turned.

    Returns:
        [..., out].
    """
    operands = policy.forward
    note_product(name, "linear", (input, operands.input), (weight, operands.weight))
    with plain():
        backward = backward_of(input, weight, policy, name, "linear")
        if not isinstance(weight, BlockTensor) and not rotation:
            result = emulated.linear(input, weight, bias, policy, backward)
            if result is not None:
                return deliver(result, policy)
        turned = rotated(input, rotation)
        left = cast_operand(turned, operands.input, -1)
        tell_product("matrix", input, left, weight, operands.weight, -1, rotation=rotation)
        right = weight  # multiplied as stored, if it can be
        if not isinstance(weight, BlockTensor) or backward or unserved(weight):
            right = cast_right(weight, operands.weight, -1, rotation)
        source = weight if isinstance(weight, BlockTensor) else rotated(weight, rotation)
        return deliver(flow(LINEAR, left, right, bias, (turned, source), backward), policy)


def matmul(left: Tensor, right: Tensor, *, policy: Policy, name: str = "") -> Tensor:
    """`torch.matmul` on operands cast along the dimension that is summed over.

    A parameter (or a view of one) is cast as `forward.weight` and what it is multiplied with as
    `forward.input`; two activations are cast as `matmul.left` and `matmul.right`.
    """
    with plain():
        product = multiply(left, right, policy=policy, name=name)
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
        result = add_product(
            input,
            left,
            right,
            torch.addmm,
            policy=policy,
            name=name,
            product="addmm",
            beta=beta,
            alpha=alpha,
        )
        return result if unfit(left, right) else deliver(result, policy)
