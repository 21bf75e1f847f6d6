"""Block Hadamard rotation: outliers of a block spread over all of its values before a cast.

The K values that a product sums over are turned in whole blocks by an orthonormal Hadamard matrix
R (Sylvester's, divided by the root of its size; symmetric, so its own inverse), inputs and weights
alike: (x R)(R w) = x w in exact arithmetic. Weights are turned once, and stored turned; inputs are
turned at every call, before their cast. What an axis has beyond whole blocks stays as it is.

Linear layers (`torch.nn.Linear`) are rotated; not convolutions, recurrent layers, the projections
inside `MultiheadAttention`, products written as operators, and layers whose weight is also a table.
"""

from functools import cache

import torch
from torch import Tensor, nn

from microscale.policy import Policy

USUAL, SMALL = 32, 16
"""Values that are turned together: as many as an MX block has, or NVFP4's."""


def rotation_of(policy: Policy) -> int:
    """How many values are turned together by a module's policy, 0 for none."""
    if policy.rotation == "off":
        return 0
    operands = (policy.forward.weight, policy.forward.input)
    blocks = [operand.format.block for operand in operands if operand is not None]
    return SMALL if SMALL in blocks else USUAL


def rotated(x: Tensor, size: int, axis: int = -1) -> Tensor:
    """`x` with whole blocks of `size` values along `axis` turned; turned twice it is `x` again.

    `size` 0 leaves it as it is. The result has the type of x, in which the sums are rounded.
    """
    whole = x.shape[axis] // size * size if size else 0
    if not whole:
        return x
    turned = x.movedim(axis, -1)
    blocks = turned[..., :whole].unflatten(-1, (-1, size))
    matrix = torch.tensor(_signs(size), dtype=x.dtype, device=x.device)
    blocks = (blocks @ matrix) * size**-0.5
    return torch.cat([blocks.flatten(-2), turned[..., whole:]], -1).movedim(-1, axis)


@cache
def _signs(size: int) -> tuple[tuple[float, ...], ...]:
    """Sylvester's matrix: -1 where row and column number share an odd number of bits."""
    numbers = range(size)
    return tuple(tuple((-1.0) ** (i & j).bit_count() for j in numbers) for i in numbers)


def tied_to_others(model: nn.Module) -> list[str]:
    """The names of linear layers whose weight is held by another kind of module too."""
    others = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) in others
    ]
