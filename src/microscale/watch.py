"""Casts of operands and products, seen as they happen: `with watching(watcher): model(x)`.

Without a watcher a cast pays one question. Compiled code is not watched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from microscale.operands import Operand

Watcher = Callable[[Tensor, Operand, int, bool], None]
"""Called with the values before the cast, the operand, the axis, and whether it is a weight."""

_watchers: list[Watcher] = []

Kind = Literal["matrix", "windows", "convolution", "transposed convolution", "table"]


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of activations with a weight that is about to run.

    Attributes:
        kind: "matrix": left [..., K]; "windows": left [N, groups, places, K]; the convolutions:
            left [N, channels, ...] or without N; "table": rows are looked up, left holds integers.
        source: the activations before their cast.
        left: what is multiplied.
        weight: as it is stored: a parameter, a view of one, or a packed tensor.
        operand: how the weight is cast.
        axis: of `weight`, that is summed over.
        geometry: of a convolution, in the order in which PyTorch takes it.
        rotation: how many values of `left` were turned together (`microscale.rotation`); the
            weight is turned only where it is packed.
    """

    kind: Kind
    source: Tensor
    left: Tensor
    weight: Tensor
    operand: Operand | None
    axis: int
    geometry: tuple[object, ...] = ()
    rotation: int = 0


def watched() -> bool:
    """Whether anybody wants to see casts or products."""
    return bool(_watchers or _product_watchers)


ProductWatcher = Callable[[Product], None]

_product_watchers: list[ProductWatcher] = []


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every cast of an operand of a product that happens inside."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(x: Tensor, operand: Operand, axis: int, *, weight: bool) -> None:
    """Tell the watchers that `x` is about to be cast; a weight also where its cast is kept."""
    if torch.compiler.is_compiling() or not _watchers:
        return
    for watcher in _watchers:
        watcher(x, operand, axis, weight)


@dataclass(slots=True, eq=False)
class Place:
    """Where a backward product runs: its module, what it is of, and the operands to be cast."""

    module: str
    product: str
    operands: list[str]


_place: list[Place] = []


def enter_backward(module: str, product: str, operands: list[str]) -> None:
    """Say that a backward product begins, whose `operands` are cast in this order."""
    if not torch.compiler.is_compiling() and _watchers:
        _place[:] = [Place(module, product, operands)]


def leave_backward() -> None:
    """Say that it is over."""
    if not torch.compiler.is_compiling():
        _place.clear()


def backward_place() -> Place | None:
    """The backward product that runs now, for watchers; None in a forward pass."""
    return _place[0] if _place else None


@contextmanager
def watching_products(watcher: ProductWatcher) -> Iterator[None]:
    """Tell `watcher` of every product of activations with a weight that happens inside."""
    _product_watchers.append(watcher)
    try:
        yield
    finally:
        _product_watchers.remove(watcher)


def tell_product(  # noqa: PLR0917  (the fields of a product)
    kind: Kind,
    source: Tensor,
    left: Tensor,
    weight: Tensor,
    operand: Operand | None,
    axis: int,
    geometry: tuple[object, ...] = (),
    *,
    rotation: int = 0,
) -> None:
    """Tell the watchers of a product that is about to run; see `Product`."""
    if torch.compiler.is_compiling() or not _product_watchers:
        return
    product = Product(kind, source, left, weight, operand, axis % weight.dim(), geometry, rotation)
    for watcher in _product_watchers:
        watcher(product)
