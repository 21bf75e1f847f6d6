"""Recipes: what is done to a whole model with data."""

from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.finetune import Plan, finetune
from microscale.recipes.preparation import prepare, range_parameters, settle
from microscale.recipes.ranges import ranges
from microscale.recipes.search import search
from microscale.recipes.sweep import sweep

__all__ = [
    "Plan",
    "error_diffusion",
    "finetune",
    "prepare",
    "range_parameters",
    "ranges",
    "search",
    "settle",
    "sweep",
]
