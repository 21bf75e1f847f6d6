"""What every product of a layer really multiplied, and what it should have given.

A `TorchDispatchMode` sits below everything that the layers do: it sees the operators with the very
operands that PyTorch multiplied. Each product is then held against float64.

The bound is that of any order of summation (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., section 3.1): a sum of K products in a type of unit roundoff u is off by at
most gamma_K sum |a b|, gamma_K = K u / (1 - K u). A bias or beta C is one more term.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from microscale.cast import cast

aten = torch.ops.aten


@dataclass
class Seen:
    """One product: the operator, its factors, what was added, the result."""

    operator: str
    left: Tensor
    right: Tensor
    added: Tensor | None
    result: Tensor
    geometry: tuple[Any, ...] = ()

    @property
    def reduction(self) -> int:
        """How many products each value of the result sums."""
        if self.transposed:
            # Each position takes a part of the kernel, at most all of it.
            return self.right[:, 0].numel() // int(self.geometry[-1])
        return self.right[0].numel() if self.geometry else self.left.shape[-1]

    @property
    def transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return bool(self.geometry) and bool(self.geometry[3])

    def exact(self) -> tuple[Tensor, Tensor]:
        """The result in float64, and the sum of magnitudes that bounds its error."""
        return self._product(self.left, self.right, self.added), self._product(
            self.left.abs(), self.right.abs(), None if self.added is None else self.added.abs()
        )

    def _product(self, left: Tensor, right: Tensor, added: Tensor | None) -> Tensor:
        left, right = left.double(), right.double()
        bias = None if added is None else added.double()
        if self.geometry:
            result: Tensor = aten.convolution.default(left, right, bias, *self.geometry)
            return result
        return left @ right if bias is None else bias + left @ right

    def check_result(self) -> None:
        """Hold the result against float64 within the derived bound."""
        exact, magnitudes = self.exact()
        terms = self.reduction + (self.added is not None)
        u = torch.finfo(self.result.dtype).eps / 2
        bound = terms * u / (1 - terms * u) * magnitudes + torch.finfo(self.result.dtype).tiny
        assert ((self.result.double() - exact).abs() <= bound).all(), self.operator

    def check_operands(self, left: str | None, right: str | None) -> None:
        """Hold that the factors are on their formats' grids along the reduction axis.

        Casting twice changes nothing (with the floor rule), so a cast factor equals its cast.
        """
        axes = (1, 0 if self.transposed else 1) if self.geometry else (-1, -2)
        if not self.geometry and self.right.dim() == 1:
            axes = (-1, -1)
        for factor, fmt, axis in ((self.left, left, axes[0]), (self.right, right, axes[1])):
            if fmt is not None:
                assert torch.equal(cast(factor, fmt, axis), factor), (self.operator, fmt)


class ProductSpy(TorchDispatchMode):
    """Lists every product that runs inside: `with ProductSpy() as spy: layer(x)`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Seen] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note it if it is a product."""
        result = func(*args, **(kwargs or {}))
        name, packet = str(func), func.overloadpacket
        if packet in (aten.mm, aten.bmm):
            self.seen.append(Seen(name, args[0], args[1], None, result))
        elif packet in (aten.addmm, aten.baddbmm, aten.addmm_, aten.baddbmm_):
            self.seen.append(Seen(name, args[1], args[2], args[0], result))
        elif packet in (aten.mv, aten.dot, aten.vdot):
            self.seen.append(Seen(name, args[0], args[1], None, result))
        elif packet in (aten.addmv, aten.addmv_):
            self.seen.append(Seen(name, args[1], args[2], args[0], result))
        elif packet is aten.convolution:
            self.seen.append(Seen(name, args[0], args[1], args[2], result, tuple(args[3:])))
        return result

    def check(self, left: str | None, right: str | None) -> None:
        """Hold operands and result of every product."""
        assert self.seen
        for seen in self.seen:
            seen.check_operands(left, right)
            seen.check_result()
