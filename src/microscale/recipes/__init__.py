"""Recipes: what is done to a whole model with data."""

from microscale.recipes.diffusion import error_diffusion

__all__ = ["error_diffusion"]
