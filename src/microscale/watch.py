"""Casts of operands, seen as they happen: `with watching(watcher): model(x)`.

Without a watcher a cast pays one question. Compiled code is not watched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from microscale.operands import Operand

Watcher = Callable[[Tensor, Operand, int, bool], None]
"""Called with the values before the cast, the operand, the axis, and whether it is a weight."""

_watchers: list[Watcher] = []


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
