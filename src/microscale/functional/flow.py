"""The compute flow of training: backward products on operands of their own (2310.10537, Figure 2).

A product of cast factors has, by itself, the gradients that these factors give. Where a policy says
what dgrad and wgrad multiply, each of their operands is cast afresh, from the values before any
cast, along the dimension that its own product sums over. The result is passed on straight through
the casts of the forward product; the gradient of a bias is a plain sum.

| product | of | cast along |
| --- | --- | --- |
| forward | left [M, K], right [K, N] | K |
| gradient of left | gradient [M, N], right | N |
| gradient of right | left, gradient | M: tokens, or batch and positions, flattened |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.factor import Factor, narrow_product
from microscale.functional.product import cast_factor, cast_pair, unfit
from microscale.functional.rotation import rotate
from microscale.ledger import How, note, recording
from microscale.operands import Operand
from microscale.policy import Policy
from microscale.tensor import BlockTensor
from microscale.watch import enter_backward, leave_backward
from microscale.weights import is_uncast, is_weight


@dataclass(frozen=True, slots=True)
class Gemm:
    """One backward product: how its operands are cast, and whether both are rotated before.

    Attributes:
        path: where the policy says so, "dgrad" or "wgrad".
        left: of the gradient of the left factor, the gradient; of the right one's, the left factor.
        right: the other operand.
        hadamard: size of the random Hadamard transforms along the summed dimension, or 0.
        within: whether blocks along tokens end where a sample does.
    """

    path: str
    left: Operand | None = None
    right: Operand | None = None
    hadamard: int = 0
    within: bool = False

    def over_tokens(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, *, turned: bool = False
    ) -> Tensor:
        """Multiply [..., T, K], transposed, with [..., T, N]: summed over all but K and N.

        `turned` is the transpose of that. Either is contiguous.
        """
        if not self.within:
            return self.matmul(_rows(left).mT, _rows(right), dtype, turned=turned)
        columns = left.mT
        if self.hadamard:
            columns, right = rotate(columns, right, self.hadamard)
        a, b = cast_factor(columns, self.left, -1).mT, cast_factor(right, self.right, -2)
        return self._product(_rows(a).mT.to(dtype), _rows(b).to(dtype), turned=turned)

    def matmul(
        self, left: Tensor, right: Tensor, dtype: torch.dtype, *, turned: bool = False
    ) -> Tensor:
        """Multiply [..., M, R] with [..., R, N], cast along R, in `dtype`."""
        if self.hadamard:
            left, right = rotate(left, right, self.hadamard)
        if left.dim() == right.dim() == 2 and not torch.is_grad_enabled():
            pair = Factor(left, self.left, 1), Factor(right, self.right, 0, is_weight(right))
            if (product := narrow_product(*pair, turned=turned)) is not None:
                return self.unscaled(product.to(dtype))
        a, b = cast_factor(left, self.left, -1), cast_factor(right, self.right, -2)
        return self._product(a.to(dtype), b.to(dtype), turned=turned)

    def _product(self, a: Tensor, b: Tensor, *, turned: bool) -> Tensor:
        return self.unscaled(torch.matmul(b.mT, a.mT) if turned else torch.matmul(a, b))

    def unscaled(self, product: Tensor) -> Tensor:
        """Divide by what the operands were multiplied with before their casts."""
        factor = 1.0
        for operand in (self.left, self.right):
            factor *= 1.0 if operand is None else operand.factor
        return product if factor == 1 else product / factor


@dataclass(frozen=True, slots=True)
class Backward:
    """The products that give the gradients of both factors, of which product in which module."""

    of_left: Gemm
    of_right: Gemm
    name: str = ""
    product: str = ""
    factors: tuple[str, str] = ("left", "right")

    def begin(self, gemm: Gemm) -> None:
        """Note that one of them runs, and tell watchers."""
        names = ("grad", self.factors[1]) if gemm is self.of_left else (self.factors[0], "grad")
        pairs = zip(names, (gemm.left, gemm.right), strict=True)
        cast = [name for name, operand in pairs if operand is not None]
        enter_backward(self.name, f"{self.product} {gemm.path}", cast)
        if recording():
            operands = gemm.left, gemm.right
            how: How = "emulated" if any(operands) else "skipped"
            reason = "" if any(operands) else "the policy leaves both operands in the wider type"
            note(self.name, f"{self.product} {gemm.path}", how, operands, reason)


class Product(Protocol):
    """A bilinear function of two factors, to which a bias may be added, and its gradients."""

    def run(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The product itself."""

    def of_left(self, grad: Tensor, right: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        """The gradient of the left factor, which has that shape."""

    def of_right(self, left: Tensor, grad: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        """The gradient of the right factor, which has that shape."""

    def of_bias(self, grad: Tensor) -> Tensor:
        """The gradient of the bias."""


def backward_of(
    left: Tensor, right: Tensor, policy: Policy, name: str, product: str
) -> Backward | None:
    """The backward products of left @ right as the policy has them; None if it has none.

    A weight's are dgrad and wgrad. Those of two activations take `dgrad.grad` and `wgrad.grad`
    beside the operands of `matmul`, and are left alone where the forward product is.
    """
    dgrad, wgrad, matmul = policy.dgrad, policy.wgrad, policy.matmul
    if is_uncast() or not any((dgrad.grad, dgrad.weight, wgrad.input, wgrad.grad)):
        return None
    turns = dgrad.hadamard, wgrad.hadamard
    if _is_weight(right):
        return Backward(
            Gemm("dgrad", dgrad.grad, dgrad.weight, turns[0]),
            Gemm("wgrad", wgrad.input, wgrad.grad, turns[1], wgrad.tokens == "sample"),
            name,
            product,
            ("input", "weight"),
        )
    if _is_weight(left):
        return Backward(
            Gemm("wgrad", wgrad.grad, wgrad.input, turns[1]),
            Gemm("dgrad", dgrad.weight, dgrad.grad, turns[0]),
            name,
            product,
            ("weight", "input"),
        )
    if not (matmul.left or matmul.right):
        return None
    return Backward(
        Gemm("dgrad", dgrad.grad, matmul.right if dgrad.grad else None, turns[0]),
        Gemm("wgrad", matmul.left if wgrad.grad else None, wgrad.grad, turns[1]),
        name,
        product,
    )


def _is_weight(x: Tensor) -> bool:
    return is_weight(x) or isinstance(x, BlockTensor)


def flow(
    product: Product,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    sources: tuple[Tensor, Tensor],
    backward: Backward | None,
) -> Tensor:
    """Run a product of cast factors, whose gradients are those of its `backward`.

    `sources` are the factors before their casts; a packed one is decoded for the backward pass.
    """
    wanted = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    if backward is None or not wanted:
        return product.run(left, right, bias)
    first, second = (x.dequantize() if isinstance(x, BlockTensor) else x for x in sources)
    arguments = left, right, bias, first, second, product, backward
    result: Tensor = _Flow.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _Flow(torch.autograd.Function):
    """The gradients go to the cast factors, which pass them on to what they were cast from."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: PLR0917
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        first: Tensor,  # noqa: ARG004
        second: Tensor,  # noqa: ARG004
        product: Product,
        backward: Backward,  # noqa: ARG004
    ) -> Tensor:
        return product.run(left, right, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        left, right, bias, first, second, ctx.product, ctx.gemms = inputs
        ctx.save_for_backward(first, second)
        ctx.types = left.dtype, right.dtype, None if bias is None else bias.dtype
        ctx.shapes = left.shape, right.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        product, gemms = ctx.product, ctx.gemms
        of_left = of_right = of_bias = None
        if ctx.needs_input_grad[0]:
            gemms.begin(gemms.of_left)
            of_left = product.of_left(grad, second, ctx.shapes[0], gemms.of_left)
            of_left = of_left.to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            gemms.begin(gemms.of_right)
            of_right = product.of_right(first, grad, ctx.shapes[1], gemms.of_right)
            of_right = of_right.to(ctx.types[1])
        leave_backward()
        if ctx.needs_input_grad[2]:
            of_bias = product.of_bias(grad).to(ctx.types[2])
        return of_left, of_right, of_bias, None, None, None, None


class _Linear:
    """Activations [..., K] and a weight [N, K]."""

    def run(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(left, right, bias)

    def of_left(self, grad: Tensor, right: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        return gemm.matmul(_rows(grad), right, grad.dtype).reshape(shape)

    def of_right(self, left: Tensor, grad: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        return gemm.over_tokens(left, grad, grad.dtype, turned=True).reshape(shape)

    def of_bias(self, grad: Tensor) -> Tensor:
        return _rows(grad).sum(0)


class _Matmul:
    """Two factors of two or more dimensions each, as `torch.matmul` takes them."""

    def run(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG002
        return torch.matmul(left, right)

    def of_left(self, grad: Tensor, right: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        if len(shape) == 2 < grad.dim():  # one matrix for all of a batch
            columns = grad.movedim(-2, 0).flatten(1), right.movedim(-2, 0).flatten(1)
            return gemm.matmul(columns[0], columns[1].mT, grad.dtype)
        return gemm.matmul(grad, right.mT, grad.dtype).sum_to_size(shape)

    def of_right(self, left: Tensor, grad: Tensor, shape: torch.Size, gemm: Gemm) -> Tensor:
        if len(shape) == 2 < grad.dim():
            return gemm.over_tokens(left, grad, grad.dtype)
        return gemm.matmul(left.mT, grad, grad.dtype).sum_to_size(shape)

    def of_bias(self, grad: Tensor) -> Tensor:
        raise NotImplementedError  # no bias is ever given


LINEAR, MATMUL = _Linear(), _Matmul()


def multiply(
    left: Tensor,
    right: Tensor,
    *,
    policy: Policy,
    name: str = "",
    product: str = "matmul",
    owners: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`torch.matmul` of factors cast by `cast_pair`, which the arguments are those of."""
    cast = cast_pair(left, right, policy=policy, name=name, product=product, owners=owners)
    if unfit(left, right):
        return torch.matmul(*cast)
    backward = backward_of(*(owners or (left, right)), policy, name, product)
    if backward is None:
        return torch.matmul(*cast)
    row, column = left.dim() == 1, right.dim() == 1
    a, first = (x.unsqueeze(0) if row else x for x in (cast[0], left))
    b, second = (x.unsqueeze(1) if column else x for x in (cast[1], right))
    result = flow(MATMUL, a, b, None, (first, second), backward)
    result = result.squeeze(-1) if column else result
    return result.squeeze(-1 if column else -2) if row else result


def add_product(
    added: Tensor,
    left: Tensor,
    right: Tensor,
    function: Callable[..., Tensor],
    *,
    policy: Policy,
    name: str,
    product: str,
    **scales: Any,
) -> Tensor:
    """Call one of the family of `torch.addmm` on factors cast by `cast_pair`.

    With backward products of its own it is beta added + alpha (left @ right), in two steps.
    """
    if unfit(left, right) or backward_of(left, right, policy, name, product) is None:
        return function(
            added, *cast_pair(left, right, policy=policy, name=name, product=product), **scales
        )
    multiplied = multiply(left, right, policy=policy, name=name, product=product)
    beta, alpha = scales.pop("beta", 1), scales.pop("alpha", 1)
    if scales:
        raise MicroscaleError(
            f"{product} of {name!r} was called with {', '.join(scales)}, which has no backward "
            "pass on cast operands; leave it away, or the module out by `ignore`."
        )
    result = alpha * multiplied if beta == 0 else beta * added + alpha * multiplied
    return added.copy_(result) if function.__name__.endswith("_") else result


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
