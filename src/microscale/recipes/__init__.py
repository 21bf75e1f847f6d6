"""Recipes: what is done to a whole model with data."""

from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.ranges import ranges
from microscale.recipes.search import search
from microscale.recipes.training.config import TrainConfig
from microscale.recipes.training.train import train

__all__ = ["TrainConfig", "error_diffusion", "ranges", "search", "train"]
