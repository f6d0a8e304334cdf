"""Recipes of the papers on training itself."""
