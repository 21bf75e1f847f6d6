"""Two processes with half the data each solve what one with all of it does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing as processes
from torch import Tensor, nn

from microscale.recipes.diffusion import error_diffusion
from microscale.tensor import BlockTensor

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def make() -> nn.Module:
    torch.manual_seed(0)
    sizes = ((64, 64), (64, 64), (64, 8))
    return nn.Sequential(*(nn.Linear(*size) for size in sizes))


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(100, 64) for _ in range(4)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.dequantize() if isinstance(p, BlockTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def work(rank: int, folder: str) -> None:
    place = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    model = make()
    report = error_diffusion(model, "mxfp4", data()[rank::2], progress=Path(folder) / "progress")
    torch.save((weights(model), [o.samples for o in report.outcomes]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_shares_add_up_to_the_whole(tmp_path: Path) -> None:
    spawn: Any = processes.spawn  # type: ignore[attr-defined]
    spawn(work, (str(tmp_path),), nprocs=2)
    alone = make()
    error_diffusion(alone, "mxfp4", data())
    (first, samples), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert samples == [400, 400, 400]
    whole = weights(alone)
    for name, values in first.items():
        assert torch.equal(values, second[name])
        # Sums in another order move a value across the middle between two codes now and then.
        assert (values != whole[name]).float().mean() < 0.01
    assert not (tmp_path / "progress").exists()
