"""The processes that train together: one, or those that `torchrun` starts.

Weights, gradients and optimizer are sharded by FSDP2. Each process casts the activations and
gradients of its own windows, so the blocks of wgrad, which run along tokens, never straddle two.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from microscale.errors import MicroscaleError


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, batch: int, accumulate: int) -> list[slice]:
        """The rows of a batch that this process takes, part by part; raises MicroscaleError."""
        if batch % (self.size * accumulate):
            raise MicroscaleError(
                f"config batch = {batch} cannot be shared by {self.size} processes in accumulate = "
                f"{accumulate} parts; make it a multiple of {self.size * accumulate}."
            )
        rows = batch // (self.size * accumulate)
        begin = self.rank * rows * accumulate
        return [slice(begin + i * rows, begin + (i + 1) * rows) for i in range(accumulate)]

    def shard(self, model: nn.Module) -> None:
        """Shard the parameters of a GPT, block by block, if there are several processes."""
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        blocks = model.get_submodule("blocks")
        for block in blocks.children():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        return self.total(x) / self.size

    def total(self, x: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the first process do this before the others, which wait; its failure ends all."""
        failed = torch.zeros(1, device=self.device)
        if not self.first:
            self._hear(failed)
            yield
            return
        try:
            yield
        except BaseException:
            self._hear(failed + 1)
            raise
        self._hear(failed)

    def _hear(self, failed: Tensor) -> None:
        if self.size == 1:
            return
        dist.broadcast(failed, 0)
        if failed.item() and not self.first:
            raise MicroscaleError("the first process stopped; see its message.")


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that `torchrun` started, or be alone.

    A process group that is there is used and left as it is; a program that trains several times
    makes its own, since one that is made twice may meet what is left of the first.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device if ":" in device or device == "cpu" else f"{device}:{local}")
    if size == 1:
        yield World(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, place)
    finally:
        if mine:
            dist.destroy_process_group()
