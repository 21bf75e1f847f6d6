"""The backward products of convolutions, direct and transposed, on operands of their own.

The gradient of the input sums over the out-channels of a group (and the kernel), so its operands
are cast along these; the gradient of the weight sums over batch and positions, which are flattened
for the casts. Its operands are shifted against each other, one position of the kernel at a time, so
there is no dimension along which both could be rotated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.flow import Backward, Gemm
from microscale.functional.product import cast_factor
from microscale.operands import Operand
from microscale.weights import cast_operand

Each = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of [N, in, ...] with a weight, as `run` calls it.

    Attributes:
        function: of PyTorch, called with `geometry` after input, weight and bias.
        geometry: as the function takes it.
        stride: one number for each axis, and so on.
        transposed: whether it is a transposed one.
        output_padding: of a transposed one.
        rest: zeros that are added before, as `F.pad` takes them.
    """

    function: Callable[..., Tensor]
    geometry: tuple[object, ...]
    stride: Each
    padding: Each
    dilation: Each
    groups: int
    transposed: bool = False
    output_padding: Each = ()
    rest: tuple[int, ...] = ()

    def run(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution itself."""
        return self.function(self._padded(left), right, bias, *self.geometry)

    def of_left(self, grad: Tensor, right: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        """The gradient of the input, operands cast along out-channels."""
        e = cast_channels(grad, gemm.left, 1 - grad.dim(), self.groups)
        w = self._along_outputs(right, gemm.right)
        nothing = self._padded(e.new_empty(1).expand(shape))
        found = self._gradients(e, nothing, w.to(e.dtype), (True, False, False))[0]
        return gemm.unscaled(F.pad(found, [-p for p in self.rest]) if self.rest else found)

    def of_right(self, left: Tensor, grad: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        """The gradient of the weight, operands cast along batch and positions."""
        a, e = (
            along_positions(x, operand, within=gemm.within)
            for x, operand in ((left, gemm.left), (grad, gemm.right))
        )
        a = self._padded(a)
        nothing = e.new_empty(1).expand(shape)
        found = self._gradients(e, a.to(e.dtype), nothing, (False, True, False))[1]
        return gemm.unscaled(found)

    def of_bias(self, grad: Tensor) -> Tensor:
        """The sum of the gradient over batch and positions."""
        return grad.transpose(0, 1).flatten(1).sum(1)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.rest) if self.rest else x

    def _gradients(
        self, grad: Tensor, left: Tensor, right: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            grad, left, right, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding or (0,) * len(self.stride), self.groups, wanted,
        )  # fmt: skip
        return found

    def _along_outputs(self, weight: Tensor, operand: Operand | None) -> Tensor:
        """Cast along the out-channels of each group: dimension 0, or 1 of a transposed one."""
        if operand is None:
            return weight
        if self.transposed:
            return cast_factor(weight.flatten(2), operand, 1).view_as(weight)
        apart = weight.unflatten(0, (self.groups, -1)).flatten(2)
        if self.groups == 1:
            return cast_factor(apart[0], operand, 0).view_as(weight)
        return cast_operand(apart, operand, 1).reshape(weight.shape)


def check_rotations(backward: Backward | None) -> None:
    """Refuse what convolutions cannot do; raises MicroscaleError."""
    if backward and (backward.of_left.hadamard or backward.of_right.hadamard):
        raise MicroscaleError(
            f"{backward.product} {backward.name!r}: operands of a convolution cannot be rotated. "
            'Set hadamard = 0 for it in an override, or convolution = "window".'
        )


def along_positions(x: Tensor, operand: Operand | None, *, within: bool = False) -> Tensor:
    """Cast [N, channels, ...] along batch and positions, flattened, or `within` each sample."""
    if operand is None:
        return x
    if within:
        return cast_operand(x.flatten(2), operand, -1).view(x.shape)
    channels = x.transpose(0, 1)
    return cast_operand(channels.flatten(1), operand, -1).view(channels.shape).transpose(0, 1)


def cast_channels(x: Tensor, operand: Operand | None, axis: int, groups: int) -> Tensor:
    """Cast activations along channels, the blocks of each group anew.

    Tiles span channels and positions, flattened, of one sample.
    """
    if operand is not None and isinstance(operand.format.block, tuple) and axis < -2:
        flat = cast_channels(x.flatten(axis + 1), operand, -2, groups)
        return flat.reshape(x.shape)
    if operand is None or groups == 1 or x.shape[axis] % groups:
        return cast_operand(x, operand, axis)
    apart = x.unflatten(axis, (groups, -1))
    joined: Tensor = cast_operand(apart, operand, axis).flatten(axis - 1, axis)
    return joined
