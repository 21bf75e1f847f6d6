"""Outputs of modules, kept until they are needed again: in memory up to a budget, then on disk."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Key = tuple[object, ...]


class Shelf:
    """Keeps trees of tensors by key."""

    def __init__(self, budget: int) -> None:
        """Keep `budget` bytes in memory, the rest in a temporary folder."""
        self._budget = budget
        self._kept: dict[Key, tuple[list[Any] | Path, Any]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def put(self, key: Key, tree: Any) -> None:
        """Keep `tree`, in the place of what has the same key."""
        self.drop(key)
        leaves, shape = pytree.tree_flatten(tree)
        size = _bytes(leaves)
        if size <= self._budget:
            self._budget -= size
            self._kept[key] = leaves, shape
            return
        self._kept[key] = self._write(leaves), shape

    def get(self, key: Key) -> Any:
        """What is kept."""
        held, shape = self._kept[key]
        leaves = torch.load(held, weights_only=True) if isinstance(held, Path) else held
        return pytree.tree_unflatten(leaves, shape)

    def drop(self, key: Key) -> None:
        """Forget what is kept, if there is something."""
        held, _ = self._kept.pop(key, (None, None))
        if isinstance(held, Path):
            held.unlink()
        elif held is not None:
            self._budget += _bytes(held)

    def close(self) -> None:
        """Forget everything."""
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _write(self, leaves: list[Any]) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="microscale-")
        self._count += 1
        path = Path(self._folder.name) / str(self._count)
        torch.save(leaves, path)
        return path


def _bytes(leaves: list[Any]) -> int:
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
