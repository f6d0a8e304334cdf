"""Recipes of the papers on space."""
