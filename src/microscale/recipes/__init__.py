"""Recipes: what is done to a whole model with data."""

from typing import TYPE_CHECKING

from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.finetune import Plan, finetune
from microscale.recipes.preparation import prepare, range_parameters, settle
from microscale.recipes.ranges import ranges
from microscale.recipes.search import search
from microscale.recipes.sweep import sweep
from microscale.recipes.training.config import TrainConfig

if TYPE_CHECKING:
    from microscale.recipes.training.train import train

__all__ = [
    "Plan",
    "TrainConfig",
    "error_diffusion",
    "finetune",
    "prepare",
    "range_parameters",
    "ranges",
    "search",
    "settle",
    "sweep",
    "train",
]


def __getattr__(name: str) -> object:
    """Load `train` when it is first used: torch.distributed.checkpoint takes a second."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from microscale.recipes.training.train import train

    return train
