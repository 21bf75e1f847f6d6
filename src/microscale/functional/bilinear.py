"""The bilinear product, as two products: the weight with the second input, then with the first."""

from torch import Tensor

from microscale.functional.flow import LINEAR, MATMUL, backward_of, flow
from microscale.functional.product import cast_right, note_product, plain
from microscale.functional.vector import deliver
from microscale.policy import Policy
from microscale.watch import tell_product
from microscale.weights import cast_operand


def bilinear(
    input1: Tensor,
    input2: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.nn.functional.bilinear` on cast operands.

    The weight and `input2` are cast along in2 as `forward.weight` and `forward.input`. What comes
    of them is an activation, and is cast along in1 as `matmul.left`, `input1` as `matmul.right`.

    Args:
        input1: [..., in1].
        input2: [..., in2].
        weight: [out, in1, in2]; a BlockTensor is used as it is.
        bias: [out], not cast.
        policy: `forward` and `matmul` are used.
        name: of the module, for ledgers.

    Returns:
        [..., out].
    """
    first, second = policy.forward, policy.matmul
    note_product(name, "bilinear", (input2, first.input), (weight, first.weight))
    note_product(name, "bilinear", (input1, second.left), (input1, second.right))
    with plain():
        matrix = cast_right(weight, first.weight, -1).flatten(0, 1)
        given = cast_operand(input2, first.input, -1)
        tell_product("matrix", input2, given, weight.flatten(0, 1), first.weight, -1)
        backward = backward_of(input2, weight, policy, name, "bilinear")
        halfway = flow(LINEAR, given, matrix, None, (input2, weight.flatten(0, 1)), backward)
        halfway = deliver(halfway, policy).unflatten(-1, (weight.shape[0], weight.shape[1]))
        column = input1.unsqueeze(-1)
        left, right = cast_operand(halfway, second.left, -1), cast_operand(column, second.right, -2)
        backward = backward_of(halfway, column, policy, name, "bilinear")
        result = flow(MATMUL, left, right, None, (halfway, column), backward).squeeze(-1)
        return deliver(result if bias is None else result + bias, policy)
