"""Random orthogonal matrices: Hadamard's in Sylvester's order, its rows with random signs."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def draw(left: Tensor, right: Tensor, size: int) -> Tensor:  # noqa: ARG001
    """A matrix [size, size] in float64 for a product of two operands, from PyTorch's generator."""
    signs = torch.randint(0, 2, (size, 1)) * 2 - 1
    return (signs * hadamard(size)).to(left.device)


@lru_cache(maxsize=8)
def hadamard(size: int) -> Tensor:
    """The orthogonal matrix; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
