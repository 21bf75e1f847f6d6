"""Recipes: what is done to a whole model with data."""

from microscale.recipes.diffusion import error_diffusion
from microscale.recipes.ranges import ranges
from microscale.recipes.search import search

__all__ = ["error_diffusion", "ranges", "search"]
