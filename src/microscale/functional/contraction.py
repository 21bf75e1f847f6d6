"""Sums of products over any dimensions: einsum, tensordot, inner and addbmm, as matrix products.

Each operand is laid out as its GEMM sees it: what both have and keep comes first, as a batch; what
is summed over is one dimension, flattened in the order in which the first operand has it. Blocks
run along that dimension.
"""

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.functional.flow import multiply
from microscale.functional.product import plain, uncastable, unfit
from microscale.functional.vector import deliver
from microscale.policy import Policy
from microscale.tensor import BlockTensor

_LETTERS = string.ascii_letters


@dataclass(frozen=True, slots=True)
class Subscripts:
    """The letters of the dimensions of two operands and of their product."""

    left: str
    right: str
    result: str

    @property
    def batch(self) -> str:
        """What both operands have and the result keeps."""
        return "".join(c for c in self.result if c in self.left and c in self.right)

    @property
    def summed(self) -> str:
        """What is summed over, in the order of the left operand."""
        return "".join(c for c in self.left if c in self.right and c not in self.result)

    @property
    def rows(self) -> str:
        """What the left operand alone brings to the result."""
        return "".join(c for c in self.left if c not in self.right)

    @property
    def columns(self) -> str:
        """What the right operand alone brings to the result."""
        return "".join(c for c in self.right if c not in self.left)


def einsum(equation: str, left: Tensor, right: Tensor, *, policy: Policy, name: str = "") -> Tensor:
    """`torch.einsum` of two operands, cast along all dimensions that are summed over, flattened.

    Operands take their roles as in `matmul`. Raises MicroscaleError for an equation that is no
    matrix product: a diagonal, nothing that is summed, or a dimension that one operand alone has
    and the result has not.
    """
    found = read_equation(equation, (left, right))
    if isinstance(found, str):
        raise MicroscaleError(f"einsum {equation!r} is not quantized: {found}.")
    return contract(left, right, found, policy=policy, name=name, product="einsum")


def tensordot(
    left: Tensor,
    right: Tensor,
    dims: int | Sequence[Sequence[int]] | Tensor = 2,
    *,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.tensordot` of operands cast along all dimensions that are summed over, flattened.

    Raises MicroscaleError where `dims` sums over nothing.
    """
    found = read_dims(left, right, dims)
    if isinstance(found, str):
        raise MicroscaleError(f"tensordot with dims={dims} is not quantized: {found}.")
    return contract(left, right, found, policy=policy, name=name, product="tensordot")


def inner(left: Tensor, right: Tensor, *, policy: Policy, name: str = "") -> Tensor:
    """`torch.inner` of operands cast along their last dimensions, which are summed over."""
    if not left.dim() or not right.dim():
        raise MicroscaleError("inner product of a number is not quantized: it sums over nothing.")
    rows, columns = _LETTERS[: left.dim() - 1], _LETTERS[26 : 25 + right.dim()]
    found = Subscripts(rows + "z", columns + "z", rows + columns)
    return contract(left, right, found, policy=policy, name=name, product="inner")


def addbmm(
    input: Tensor,  # noqa: A002  (the name in torch)
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    policy: Policy,
    name: str = "",
) -> Tensor:
    """`torch.addbmm`: beta input + alpha (sum over the batch of left @ right).

    The batch is summed over too, so blocks run along batch and inner dimension, flattened.
    """
    found = Subscripts("abc", "acd", "bd")
    total = contract(left, right, found, policy=policy, name=name, product="addbmm")
    with plain():
        # As torch has it, beta = 0 hides what is not finite.
        return deliver(alpha * total if beta == 0 else beta * input + alpha * total, policy)


def contract(
    left: Tensor,
    right: Tensor,
    subscripts: Subscripts,
    *,
    policy: Policy,
    name: str = "",
    product: str = "contraction",
) -> Tensor:
    """The product that `subscripts` name, of operands cast along what is summed over."""
    s = subscripts
    if reason := uncastable(left, right):
        raise MicroscaleError(f"{product} is not quantized: {reason}.")
    sizes = _sizes(left, s.left) | _larger(_sizes(left, s.left), _sizes(right, s.right))
    with plain():
        a, b = (x.dequantize() if isinstance(x, BlockTensor) else x for x in (left, right))
        a = _laid_out(a, s.left, (s.batch, s.rows, s.summed), sizes)
        b = _laid_out(b, s.right, (s.batch, s.summed, s.columns), sizes)
        owners = left, right
        multiplied = multiply(a, b, policy=policy, name=name, product=product, owners=owners)
        kept = s.batch + s.rows + s.columns
        result = multiplied if unfit(a, b) else deliver(multiplied, policy)
        shaped = result.reshape([sizes[c] for c in kept])
        return shaped.permute([kept.index(c) for c in s.result])


def read_equation(equation: str, operands: Sequence[Tensor]) -> Subscripts | str:
    """The subscripts of an einsum, or why it is no product of two matrices."""
    if len(operands) != 2:
        return f"it has {len(operands)} operands; products of two are quantized"
    found = _letters_of(equation, operands)
    if isinstance(found, str):
        return found
    (left, right), result = found
    return _checked(Subscripts(left, right, result))


def read_chain(equation: str, operands: Sequence[Tensor]) -> list[str] | str:
    """The equations of two operands that make an einsum of several, from left to right, or why not.

    The first takes the first two operands, each other one the result so far and the next operand.
    """
    found = _letters_of(equation, operands)
    if isinstance(found, str):
        return found
    (done, *terms), result = found
    steps = []
    for place, term in enumerate(terms, start=1):
        needed = set(result).union(*terms[place:])
        kept = "".join(dict.fromkeys(c for c in done + term if c in needed))
        made = result if place == len(terms) else kept
        steps.append(f"{done},{term}->{made}")
        done = made
    return steps


def _letters_of(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str] | str:
    """The letters of each operand and of the result, or what is wrong with them."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        return f"it has {len(terms)} terms for {len(operands)} operands"
    if bad := _malformed(terms, operands):
        return bad
    free = [c for c in _LETTERS if c not in equation]
    hidden = [x.dim() - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True)]
    dots = "".join(free[: max(hidden)])
    terms = [t.replace("...", dots[len(dots) - n :]) for t, n in zip(terms, hidden, strict=True)]
    joined = "".join(terms)
    if not arrow:
        once = (c for c in sorted(set(joined) - set(dots)) if joined.count(c) == 1)
        result = "..." + "".join(once)
    return terms, result.replace("...", dots)


def read_dims(
    left: Tensor, right: Tensor, dims: int | Sequence[Sequence[int]] | Tensor
) -> Subscripts | str:
    """The subscripts of a tensordot, or why it is no product of two matrices."""
    plain_dims = dims.tolist() if isinstance(dims, Tensor) else dims
    if isinstance(plain_dims, int):
        plain_dims = range(left.dim() - plain_dims, left.dim()), range(plain_dims)
    pairs = [(i % left.dim(), j % right.dim()) for i, j in zip(*plain_dims, strict=True)]
    letters = dict(pairs)
    a = _LETTERS[: left.dim()]
    others = iter(_LETTERS[left.dim() :])
    back = {j: a[i] for i, j in letters.items()}
    b = "".join(back.get(j) or next(others) for j in range(right.dim()))
    return _checked(Subscripts(a, b, "".join(c for c in a + b if (a + b).count(c) == 1)))


def _malformed(terms: Iterable[str], operands: Iterable[Tensor]) -> str:
    for term, x in zip(terms, operands, strict=True):
        letters = term.replace("...", "")
        if not all(c in _LETTERS for c in letters) or term.count("...") > 1:
            return f"{term!r} is not a list of dimensions"
        if len(letters) > x.dim() or ("..." not in term and len(letters) != x.dim()):
            return f"{term!r} does not fit an operand of {x.dim()} dimensions"
    return ""


def _checked(s: Subscripts) -> Subscripts | str:
    for term in (s.left, s.right, s.result):
        if len(set(term)) < len(term):
            return "it takes a diagonal"
    if not s.summed:
        return "it sums no products"
    if lost := sorted(set(s.rows + s.columns) - set(s.result)):
        return f"one operand alone is summed over {', '.join(lost)}"
    if set(s.result) - set(s.left + s.right):
        return "its result has a dimension that no operand has"
    return s


def _sizes(x: Tensor, letters: str) -> dict[str, int]:
    return dict(zip(letters, x.shape, strict=True))


def _larger(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """Sizes of the second, where it has 1 those of the first: dimensions of 1 are repeated."""
    return {c: a.get(c, n) if n == 1 else n for c, n in b.items()}


def _laid_out(x: Tensor, letters: str, groups: Sequence[str], sizes: dict[str, int]) -> Tensor:
    """Bring dimensions into three groups, and flatten each; a batch of none is no dimension."""
    ordered = x.permute([letters.index(c) for c in "".join(groups)])
    shape = [sizes[c] for c in "".join(groups)]
    if list(ordered.shape) != shape:
        ordered = ordered.expand(shape)
    counts = [math.prod([sizes[c] for c in group]) for group in groups]
    return ordered.reshape(counts if groups[0] else counts[1:])
