"""Blocks that follow each other, so that what is done need not be run again.

To solve layer after layer, the network is run again and again up to each layer. Where its modules
follow each other in a list (the decoder layers of a language model, the stages of a network of
residual blocks), what the last finished block gives is kept for every batch, and finished blocks
are not run: each returns at once. Whatever else the model does (masks, positions, keywords of its
blocks) it does itself, as ever, so nothing needs to be known about it.

This holds only where nothing but the last output is used of finished blocks, which is tried out:
with the first k blocks standing still the model must give the same bits for every k.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from microscale.recipes.shelf import Shelf


class Stopped(BaseException):
    """Ends a pass whose rest is not needed; no error, so nothing in a model should catch it."""


class Stack:
    """Modules called once each, one after another.

    Attributes:
        name: of the list.
        blocks: its modules.
        ends: the number of products before the end of each block.
        done: how many are not run any more.
    """

    def __init__(self, name: str, blocks: list[nn.Module]) -> None:
        self.name, self.blocks = name, blocks
        self.ends: list[int] = []
        self.begin = 0
        self.done = 0

    @contextmanager
    def still(self, output: Any) -> Iterator[None]:
        """The blocks that are done give `output`, whatever they are given."""
        still = self.blocks[: self.done]
        for block in still:
            block.__dict__["forward"] = lambda *_, **__: output
        try:
            yield
        finally:
            for block in still:
                del block.__dict__["forward"]


class Stacks:
    """All stacks of a model, and what their finished blocks give for each batch."""

    def __init__(self, model: nn.Module, shelf: Shelf) -> None:
        self.model, self.shelf = model, shelf
        self.stacks: list[Stack] = []

    @contextmanager
    def finding(self, clock: Callable[[], int]) -> Iterator[None]:
        """Find the stacks by watching one pass, in which `clock` counts products."""
        calls: dict[nn.Module, list[tuple[int, int]]] = {}
        order: list[nn.Module] = []
        candidates = list(_lists(self.model))
        begun: dict[nn.Module, int] = {}

        def before(module: nn.Module, _: Any) -> None:
            begun[module] = clock()
            order.append(module)

        def after(module: nn.Module, _: Any, __: Any) -> None:
            calls.setdefault(module, []).append((begun[module], clock()))

        with ExitStack() as hooks:
            for block in {block for _, blocks in candidates for block in blocks}:
                for hook in (
                    block.register_forward_pre_hook(before),
                    block.register_forward_hook(after),
                ):
                    hooks.callback(hook.remove)
            yield
        places = {module: order.index(module) for module in calls}
        for name, blocks in candidates:
            once = all(len(calls.get(block, ())) == 1 for block in blocks)
            inside = any(name.startswith(f"{s.name}.") or not s.name for s in self.stacks)
            if not once or inside:
                continue
            if sorted(blocks, key=places.__getitem__) == blocks:
                stack = Stack(name, blocks)
                stack.begin = calls[blocks[0]][0][0]
                stack.ends = [calls[block][0][1] for block in blocks]
                self.stacks.append(stack)

    def verify(self, call: Callable[[], Any]) -> None:
        """Keep the stacks whose finished blocks may stand still; `call` runs the first batch."""
        for stack in list(self.stacks):
            outputs, expected = _recorded(stack.blocks, call)
            if not self._holds(stack, outputs, expected, call):
                self.stacks.remove(stack)
            stack.done = 0

    @staticmethod
    def _holds(stack: Stack, outputs: list[Any], expected: Any, call: Callable[[], Any]) -> bool:
        for stack.done, output in enumerate(outputs, start=1):
            # What a model does with outputs that are not what it expects can be any of these.
            try:
                with stack.still(output):
                    found = call()
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                return False
            if not _same(found, expected):
                return False
        return True

    def advance(self, time: int, capture: Callable[[nn.Module], None]) -> bool:
        """Finish the blocks that end before product number `time`; say whether there were any.

        `capture` keeps what a block gives, for all batches, by `keep`.
        """
        moved = False
        for stack in self.stacks:
            done = sum(end < time for end in stack.ends)
            if done > stack.done:
                capture(stack.blocks[done - 1])
                stack.done = done
                moved = True
        return moved

    def is_finished(self, span: tuple[int, int]) -> bool:
        """Whether products in a span of numbers are in finished blocks alone."""
        return any(
            s.done and s.begin < span[0] and span[1] <= s.ends[s.done - 1] for s in self.stacks
        )

    @contextmanager
    def still(self, key: tuple[object, ...]) -> Iterator[None]:
        """Finished blocks stand still, with the outputs kept under `key`."""
        with ExitStack() as stack:
            for one in self.stacks:
                if one.done:
                    stack.enter_context(one.still(self.shelf.get((one.name, *key))))
            yield

    @contextmanager
    def keeping(self, block: nn.Module, key: tuple[object, ...]) -> Iterator[None]:
        """Keep what `block` gives under `key`, and stop there."""
        (name,) = (stack.name for stack in self.stacks if block in stack.blocks)

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            self.shelf.put((name, *key), output)
            raise Stopped

        hook = block.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()


def _recorded(blocks: list[nn.Module], call: Callable[[], Any]) -> tuple[list[Any], Any]:
    """What each block gives, and the whole."""
    outputs: list[Any] = []

    def record(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(record).remove)
        return outputs, call()


def _lists(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of at least two modules, outer ones first."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            yield name, list(module)


def _same(a: Any, b: Any) -> bool:
    first, second = (pytree.tree_leaves(x) for x in (a, b))
    if len(first) != len(second):
        return False
    every = zip(first, second, strict=True)
    pairs = [(x, y) for x, y in every if isinstance(x, Tensor) and isinstance(y, Tensor)]
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)
