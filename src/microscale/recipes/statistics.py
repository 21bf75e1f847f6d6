"""What a solver knows of the data: sums of products of the inputs of one layer.

X is what the layer's product is given in the float network, X~ in the partly quantized one (cast
as the product casts it), both [samples, K] as the GEMM sees them. Of any number of samples there
remain three K x K matrices:

    H = X~^T X~        G = X~^T X        F = X^T X

H and G are all that the solvers need (arXiv 2505.11695; GPFQ, arXiv 2201.11113, in the matrix form
of Brevitas); F alone tells how large the error ||X W - X~ Q||^2 is, which costs no more than what
the symmetry of H saves. Products of one batch are in the type of the activations, at least float32,
and are summed in float64.

Range: float32 products of a batch err by about 1e-7 of the largest entries, which the damping of
the inverses (1e-6 of the diagonal's mean and more) covers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.recipes.parallel import add_up

_TILE = 512
"""From two tiles on, only tiles below the diagonal of a symmetric product are computed."""


@dataclass(slots=True, eq=False)
class Statistics:
    """H, G and F [groups, K, K] in float64, summed over `rows` samples."""

    H: Tensor
    G: Tensor
    F: Tensor
    rows: int = 0

    @classmethod
    def empty(cls, groups: int, width: int, device: torch.device | None = None) -> "Statistics":
        """Sums over no sample."""
        shape = groups, width, width
        H, G, F = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
        return cls(H, G, F)

    @classmethod
    def alike(cls, groups: int, width: int, device: torch.device | None = None) -> "Statistics":
        """What says that all inputs are alike and have nothing to do with each other."""
        one = torch.eye(width, dtype=torch.float64, device=device).expand(groups, -1, -1)
        return cls(one, one, one)

    def add(self, quantized: Tensor, wide: Tensor) -> None:
        """Add samples X~ and X, both [groups, samples, K] and in the same order.

        Raises MicroscaleError if a value is not finite, or its square is not.
        """
        dtype = torch.promote_types(torch.promote_types(quantized.dtype, wide.dtype), torch.float32)
        quantized, wide = quantized.to(dtype), wide.to(dtype)
        _add_square(self.H, quantized)
        _add_square(self.F, wide)
        _check(self.H, quantized, "the quantized")
        _check(self.F, wide, "the float")
        self.G += quantized.mT @ wide
        self.rows += quantized.shape[1]

    def reduce(self) -> None:
        """Sum over the processes of torch.distributed, if there are several."""
        for part in (self.H, self.G, self.F):
            add_up(part)
        self.rows = int(add_up(torch.tensor(self.rows, device=self.H.device)))

    def energy(self, weight: Tensor) -> float:
        """||X W||^2 for W [groups, K, N]."""
        w = weight.double()
        return float((w * (self.F @ w)).sum())

    def lost(self, weight: Tensor, values: Tensor) -> float:
        """||X W - X~ Q||^2 for W and Q [groups, K, N]."""
        w, q = weight.double(), values.double()
        rest = float((q * (self.H @ q - 2 * (self.G @ w))).sum())
        return max(self.energy(weight) + rest, 0.0)


def _check(square: Tensor, x: Tensor, what: str) -> None:
    """Refuse what is not finite: the diagonal of the square shows it at less cost."""
    if not square.diagonal(dim1=-2, dim2=-1).isfinite().all():
        bad = int((~x.square().isfinite()).sum())
        raise MicroscaleError(
            f"{bad} of {x.numel()} values that reach the layer in {what} network are NaN, infinite "
            "or too large to be squared"
        )


def _add_square(total: Tensor, x: Tensor) -> None:
    """Add x^T x, whose upper tiles are the transposed lower ones."""
    width = x.shape[-1]
    if width < 2 * _TILE:
        total += x.mT @ x
        return
    for start in range(0, width, _TILE):
        columns = slice(start, start + _TILE)
        tile = x[..., start:].mT @ x[..., columns]
        total[..., start:, columns] += tile
        below = tile[..., _TILE:, :]
        total[..., columns, start + _TILE :] += below.mT
