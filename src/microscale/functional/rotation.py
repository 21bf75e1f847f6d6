"""Random Hadamard transforms of both operands of a product, along what it sums over.

A block of h values is multiplied by D H / sqrt(h), H the Hadamard matrix in Sylvester's order and D
random signs, one vector for all blocks of both operands. The transform is orthogonal, so the
product is what it was, while each operand's outliers are spread over their blocks before the cast
(2502.20586, 2509.25149). A last block that is short is filled with zeros, which add nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import microscale.ops  # noqa: F401  (registers the operators)


def rotate(left: Tensor, right: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Transform left [..., M, R] along R and right [..., R, N] likewise, in blocks of `size`.

    R is filled up to a multiple of `size`. The signs come from PyTorch's generator, so that a
    seeded run can be repeated.
    """
    matrix: Tensor = torch.ops.microscale.rotation(left, right, size)
    return _transform(left, matrix), _transform(right.mT, matrix).mT


def _transform(x: Tensor, matrix: Tensor) -> Tensor:
    size = len(matrix)
    filled = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    # Autocast would round the result before its cast.
    with torch.autocast(x.device.type, enabled=False):
        turned: Tensor = filled @ matrix.to(x.dtype)
    return torch.flatten(turned, -2)
