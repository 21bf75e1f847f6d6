"""Several processes with a share of the data each, or the one that there usually is."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from microscale.errors import MicroscaleError

_distributed: Any = torch.distributed  # whose functions torch does not annotate


def is_parallel() -> bool:
    """Whether torch.distributed runs."""
    return bool(_distributed.is_available() and _distributed.is_initialized())


def rank() -> int:
    """The number of this process."""
    return int(_distributed.get_rank()) if is_parallel() else 0


def world() -> int:
    """How many processes there are."""
    return int(_distributed.get_world_size()) if is_parallel() else 1


def add_up(x: Tensor) -> Tensor:
    """Sum `x` over all processes, in place; returns it."""
    if is_parallel():
        _distributed.all_reduce(x)
    return x


def all_agree(said: bool) -> bool:
    """Whether all processes say so."""
    return int(add_up(torch.tensor(int(said)))) == world()


def gathered(mine: object) -> list[Any]:
    """What every process has, in the order of their numbers."""
    if not is_parallel():
        return [mine]
    every: list[Any] = [None] * world()
    _distributed.all_gather_object(every, mine)
    return every


def check_alike(names: Sequence[str]) -> None:
    """Raise MicroscaleError where processes are about to solve different things."""
    every: list[list[str]] = gathered(list(names))
    for number, other in enumerate(every):
        if other != every[0]:
            odd = sorted(set(other) ^ set(every[0])) or ["their order"]
            raise MicroscaleError(
                f"process {number} solves other weights than process 0 ({odd[0]}): the data of "
                "each must reach all layers; give each more of it."
            )
