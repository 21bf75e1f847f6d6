"""A linear layer that is emulated, beside torch's in bfloat16: forward, and a training step."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from microscale.convert import convert
from rows import Entry, Goal, Group

BATCH, WIDTH = 512, 2048
FORMATS = ("mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "mxfp4/mxfp6_e2m3")
FORWARD, STEP = 1.2, 1.4
"""Goals: time over that of torch in bfloat16."""


def section_layers() -> Iterator[Group]:
    """Weights that stay, then weights that change at every step."""
    x = torch.randn(BATCH, WIDTH).bfloat16()
    yield _group("forward, weights cast before", partial(_forward, x), FORWARD)
    yield _group("forward, backward and update of the weights", partial(_step, x), STEP)


def _group(what: str, run: Callable[[nn.Linear], object], goal: float) -> Group:
    dense = Goal("torch bfloat16", "time", goal)
    entries = {
        "torch bfloat16": Entry(partial(run, _layer("", torch.bfloat16))),
        "torch float32": Entry(partial(run, _layer("", torch.float32)), goals=(_ungoaled(dense),)),
    }
    for fmt in FORMATS:
        entries[fmt] = Entry(partial(run, _layer(fmt, torch.bfloat16)), goals=(dense,))
    return Group(f"linear layer {WIDTH} x {WIDTH}, batch {BATCH}: {what}", entries)


def _ungoaled(goal: Goal) -> Goal:
    return Goal(goal.yardstick, goal.kind)


def _layer(fmt: str, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, WIDTH).to(dtype)
    if fmt:
        convert(layer, fmt, verbose=False)
    return layer


@torch.no_grad()
def _forward(x: Tensor, layer: nn.Linear) -> Tensor:
    found: Tensor = layer(x.to(layer.weight.dtype))
    return found


def _step(x: Tensor, layer: nn.Linear) -> None:
    given = x.to(layer.weight.dtype).detach().requires_grad_()
    layer.zero_grad()
    layer(given).sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            assert p.grad is not None
            p.add_(p.grad, alpha=-1e-6)
